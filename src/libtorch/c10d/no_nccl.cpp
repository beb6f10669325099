// In place of nccl.cpp where the feature `nccl` is off.
#include "../c10d.h"

#include <stdexcept>

namespace tchd {
rust::String why_no_nccl() {
  return "this program was built without the feature nccl of tch-distributed";
}
std::unique_ptr<C10dBackend> new_nccl(
    const StoreHandle&,
    std::int32_t,
    rust::Slice<const std::uint64_t>,
    rust::Str,
    std::int32_t,
    bool,
    std::int64_t) {
  throw std::runtime_error("this build has no NCCL");
}
} // namespace tchd
