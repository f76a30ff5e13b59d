// Scratch memory for vector loads.
#ifndef LOWRA_CPU_ALIGNED_H
#define LOWRA_CPU_ALIGNED_H

#include <cstddef>
#include <cstdint>
#include <vector>

constexpr size_t kLine = 64;  // bytes of a cache line, and of the widest register

// float32 memory on a multiple of kLine, zeros at first.
class aligned_floats {
 public:
  explicit aligned_floats(int64_t count) : memory_(static_cast<size_t>(count) + kLine / sizeof(float)) {}
  aligned_floats(aligned_floats &&) = default;
  float *data() {
    const size_t off = reinterpret_cast<uintptr_t>(memory_.data()) % kLine;
    return memory_.data() + (off == 0 ? 0 : (kLine - off) / sizeof(float));
  }
  template <class Element>
  Element *as() {
    return reinterpret_cast<Element *>(data());
  }

 private:
  std::vector<float> memory_;
};

#endif
