#include "tch-distributed/src/libtorch/facts.h"
#include "tch-distributed/src/libtorch/facts.rs.h"

#include <ATen/core/Tensor.h>

namespace tchd {
RawFacts facts(const at::Tensor& t) noexcept {
  RawFacts f{};
  if (!t.defined()) {
    return f;
  }
  f.defined = true;
  try {
    f.kind = static_cast<int8_t>(t.scalar_type());
    f.device_type = static_cast<int8_t>(t.device().type());
    f.device_index = static_cast<int8_t>(t.device().index());
    f.numel = t.numel();
    f.strided = t.layout() == c10::kStrided && t.has_storage();
    if (f.strided) {
      f.contiguous = t.is_contiguous();
      f.lazy = t.is_conj() || t.is_neg();
      f.data = f.numel == 0 ? 0 : reinterpret_cast<size_t>(t.data_ptr());
    }
  } catch (...) {
    // A tensor type without these notions: seen by the caller as not strided.
    f.strided = false;
  }
  return f;
}
} // namespace tchd
