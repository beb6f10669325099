// What the classes of c10d.h hold; apart, because its headers take seconds to compile.
#pragma once
#include <c10/core/Device.h>
#include <optional>
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace tchd {
struct WorkParts {
  c10::intrusive_ptr<c10d::Work> work;
};
struct BackendParts {
  c10::intrusive_ptr<c10d::Backend> backend;
  /// NCCL's.
  std::optional<c10::Device> device;
  /// Between the start and the end of what is one operation, NCCL gives no work objects.
  bool grouping = false;
};
} // namespace tchd
