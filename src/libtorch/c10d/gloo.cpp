// Makes libtorch's Gloo engine as PyTorch makes it, so that Python ranks can be in the group.
#include "../c10d.h"

#include <cstdlib>
#include <sstream>

#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include "../store.h"
#include "../store_parts.h"
#include "parts.h"

namespace tchd {
std::unique_ptr<C10dBackend> new_gloo(
    const StoreHandle& store,
    std::int32_t rank,
    std::int32_t size,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    std::int64_t timeout_ms) {
  using c10d::ProcessGroupGloo;
  auto options = ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
  if (const char* interfaces = std::getenv("GLOO_SOCKET_IFNAME"); interfaces && *interfaces) {
    std::istringstream list(interfaces);
    for (std::string interface; std::getline(list, interface, ',');) {
      options->devices.push_back(ProcessGroupGloo::createDeviceForInterface(interface));
    }
  } else {
    options->devices.push_back(ProcessGroupGloo::createDefaultDevice());
  }
  // PyTorch takes two, which may run two operations on one tensor at once. The peers see no difference.
  options->threads = 1;
  options->group_name = std::string(name);
  options->global_ranks_in_group.assign(ranks.begin(), ranks.end());
  auto parts = std::make_unique<BackendParts>();
  parts->backend = c10::make_intrusive<ProcessGroupGloo>(store.parts().store, rank, size, options);
  parts->backend->setSequenceNumberForGroup();
  return std::make_unique<C10dBackend>(std::move(parts));
}
} // namespace tchd
