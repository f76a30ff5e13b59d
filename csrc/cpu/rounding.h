// x of a product in integers.
#ifndef LOWRA_CPU_ROUNDING_H
#define LOWRA_CPU_ROUNDING_H

#include "cpu/aligned.h"
#include "cpu/rows.h"

#include <vector>

// The memory of an integer_x (rows.h).
class rounded_x {
 public:
  // x [tokens, stride], stride a multiple of kUnit, zeros from shape.in_features on.
  rounded_x(const lowra_shape &shape, const row_kernels &kernels, const float *x, int64_t stride, int64_t tokens);

  // Null where a step of x is not to be had: x is not finite, or too large or too small for one.
  const integer_x *integers() const { return taken_ ? &integers_ : nullptr; }

 private:
  bool taken_ = false;
  integer_x integers_{};
  std::vector<aligned_floats> memory_;
};

#endif
