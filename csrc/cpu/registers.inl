// Registers of bytes as the products in integers need them, beside the registers of floats of product.inl: what they
// are on x86 and on ARM. kRegister bytes are kRegister / 16 quarters, in each of which `look_up` and `interleaved_...`
// stay.

#if defined(__aarch64__)
#include "registers_neon.inl"
#else
#include "registers_x86.inl"
#endif

namespace {

bytes lower_nibbles(bytes v) { return v & repeated_byte(15); }

}  // namespace
