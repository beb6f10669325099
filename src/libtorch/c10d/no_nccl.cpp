// In place of nccl.cpp where the feature `nccl` is off.
#include "../c10d.h"

#include <stdexcept>

namespace tchd {
bool has_nccl() noexcept {
  return false;
}
std::unique_ptr<C10dBackend> new_nccl(
    const StoreHandle&,
    std::int32_t,
    std::int32_t,
    rust::Slice<const std::uint64_t>,
    rust::Str,
    bool,
    std::int64_t) {
  throw std::runtime_error("this build has no NCCL");
}
} // namespace tchd
