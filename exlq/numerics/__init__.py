"""Pure numerics of quantization: Hessians, the rounding sweep, scales, bit packing. Needs torch only."""
