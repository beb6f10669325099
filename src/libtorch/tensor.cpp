#include "tch-distributed/src/libtorch/tensor.rs.h"

#include <ATen/core/Tensor.h>
#include <ATen/MemoryOverlap.h>

namespace tchd {
MemOverlap overlap_at_a_glance(const at::Tensor& tensor) {
  switch (at::has_internal_overlap(tensor)) {
    case at::MemOverlap::No:
      return MemOverlap::No;
    case at::MemOverlap::Yes:
      return MemOverlap::Yes;
    default:
      return MemOverlap::TooHard;
  }
}
bool same(const at::Tensor& left, const at::Tensor& right) noexcept {
  return left.is_same(right);
}
} // namespace tchd
