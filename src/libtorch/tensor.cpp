#include "tensor.h"

#include <ATen/core/Tensor.h>
#include <ATen/MemoryOverlap.h>

namespace tchd {
bool overlaps_itself(const at::Tensor& tensor) {
  return at::has_internal_overlap(tensor) == at::MemOverlap::Yes;
}
bool same(const at::Tensor& left, const at::Tensor& right) noexcept {
  return left.is_same(right);
}
} // namespace tchd
