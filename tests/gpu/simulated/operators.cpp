// libtorch's operators on the simulated devices, whose memory is the host's: what has a CUDA kernel is done by its CPU
// kernel on the same memory, by the current stream and in its order. Shapes come from the meta device; where they do not
// (an operator whose result's shape hangs on numbers, or that draws some), the caller waits for the stream and does it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using Stack = torch::jit::Stack;

const c10::DispatchKeySet CPU{DispatchKey::CPU};
const c10::DispatchKeySet META{DispatchKey::Meta};

// What concerns memory and shapes and no numbers, and works as it is.
const std::set<std::string>& kept() {
  static const auto* const names = new std::set<std::string>{
      "aten::empty.memory_format", "aten::empty_strided", "aten::as_strided", "aten::_reshape_alias", "aten::view",
      "aten::view.dtype", "aten::view_as_real", "aten::view_as_complex", "aten::set_", "aten::set_.source_Storage",
      "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::resize_", "aten::is_set_to",
      "aten::record_stream", "aten::_local_scalar_dense", "aten::is_pinned", "aten::_pin_memory", "aten::alias"};
  return *names;
}

bool on_device(const at::Tensor& t) {
  return t.defined() && t.is_cuda();
}

// Does `change` with every tensor in a value, and puts the result in its place.
IValue with_tensors(const IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> all;
    for (const at::Tensor& t : value.toTensorVector()) {
      all.push_back(change(t));
    }
    return all;
  }
  if (value.isList()) {
    auto list = value.toList().copy();
    for (std::size_t i = 0; i < list.size(); ++i) {
      const IValue element = list.get(i);
      if (element.isTensor()) {
        list.set(i, IValue(change(element.toTensor())));
      }
    }
    return list;
  }
  return value;
}

at::Tensor as_host(const at::Tensor& t) {
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}
at::Tensor like(const at::Tensor& shape, c10::Device device) {
  return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(device).requires_grad(false));
}

void on_stream(const c10::cuda::CUDAStream& stream, std::function<void()> task) {
  auto* own = new std::function<void()>(std::move(task));
  auto run = [](void* data) {
    const std::unique_ptr<std::function<void()>> task(static_cast<std::function<void()>*>(data));
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    try {
      (*task)();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "simulated CUDA: an operator failed on a stream: %s\n", e.what());
      std::abort(); // a device-side assertion would leave no more to be done either
    }
  };
  cudaLaunchHostFunc(stream, run, own);
}

bool draws(const c10::FunctionSchema& schema) {
  for (const auto& argument : schema.arguments()) {
    if (argument.name() == "generator") {
      return true;
    }
  }
  return false;
}

// The arguments with the host's view of what is on the device. Outputs without room get some of their own.
class Arguments {
 public:
  explicit Arguments(const Stack& stack, std::size_t count) {
    for (auto it = stack.end() - static_cast<std::ptrdiff_t>(count); it != stack.end(); ++it) {
      host_.push_back(it->isGenerator() ? IValue() : it->isDevice() ? IValue(c10::Device(at::kCPU)) : with_tensors(*it, [this](const at::Tensor& t) {
        if (!on_device(t)) {
          return t;
        }
        at::Tensor host = t.numel() == 0 ? at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false)) : as_host(t);
        if (!device_) {
          device_ = t.device();
        }
        all_.emplace_back(t, host);
        return host;
      }));
    }
  }
  const Stack& host() const { return host_; }
  c10::Device device() const { return device_.value_or(c10::Device(at::kCUDA, c10::cuda::current_device())); }

  // What a result of the CPU kernel is on the device.
  at::Tensor back(const at::Tensor& result) const {
    if (!result.defined() || !result.is_cpu()) {
      return result;
    }
    for (const auto& [device, host] : all_) {
      if (host.is_same(result)) {
        if (device.sizes() != host.sizes()) {
          device.resize_(host.sizes());
          if (host.numel() > 0) {
            as_host(device).copy_(host);
          }
        }
        return device;
      }
      if (host.storage().is_alias_of(result.storage()) && host.numel() > 0) {
        return device.as_strided(result.sizes(), result.strides(), device.storage_offset() + result.storage_offset());
      }
    }
    at::Tensor made = like(result, device());
    if (result.numel() > 0) {
      as_host(made).copy_(result);
    }
    return made;
  }

 private:
  Stack host_;
  std::optional<c10::Device> device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> all_;
};

// Results' shapes, made on the device; none where the meta device cannot tell.
std::optional<Stack> shapes(const OperatorHandle& op, const Stack& stack, std::size_t count, c10::Device device) {
  const auto& schema = op.schema();
  for (const auto& returned : schema.returns()) {
    if (returned.alias_info() != nullptr) {
      return std::nullopt;
    }
  }
  for (const auto& argument : schema.arguments()) {
    if (argument.alias_info() != nullptr) {
      return std::nullopt;
    }
  }
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::Meta)) {
    return std::nullopt;
  }
  std::vector<at::Tensor> inputs;
  Stack meta;
  for (auto it = stack.end() - static_cast<std::ptrdiff_t>(count); it != stack.end(); ++it) {
    meta.push_back(it->isDevice() ? IValue(c10::Device(at::kMeta)) : with_tensors(*it, [&](const at::Tensor& t) {
      return t.defined() ? inputs.emplace_back(like(t, c10::Device(at::kMeta))) : t;
    }));
  }
  try {
    op.redispatchBoxed(META, &meta);
  } catch (const std::exception&) {
    return std::nullopt;
  }
  bool views = false;
  Stack results;
  for (const IValue& value : meta) {
    results.push_back(with_tensors(value, [&](const at::Tensor& t) {
      for (const at::Tensor& input : inputs) {
        views |= t.defined() && t.storage().is_alias_of(input.storage());
      }
      return t.defined() ? like(t, device) : t;
    }));
  }
  return views ? std::nullopt : std::optional(results);
}

// Whether all returns are arguments that are written, with the shape that they have.
bool writes_in_place(const OperatorHandle& op) {
  const auto& schema = op.schema();
  for (const auto& returned : schema.returns()) {
    if (returned.alias_info() == nullptr || !returned.alias_info()->isWrite()) {
      return false;
    }
  }
  bool writes = false;
  for (const auto& argument : schema.arguments()) {
    if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) {
      writes = true;
      if (argument.is_out()) { // may be given another shape
        return false;
      }
    }
  }
  return writes;
}

void in_place_of_kernel(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const std::size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  c10::DeviceGuard guard(arguments.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(arguments.device().index());
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);

  // Numbers on the host may change as soon as this returns.
  auto deferred = [&] {
    Stack host;
    for (std::size_t i = 0; i < count; ++i) {
      const IValue& given = (*stack)[stack->size() - count + i];
      std::vector<bool> here;
      (void)with_tensors(given, [&](const at::Tensor& t) { return here.push_back(t.defined() && t.is_cpu()), t; });
      std::size_t next = 0;
      host.push_back(with_tensors(arguments.host()[i], [&](const at::Tensor& t) { return here[next++] ? t.clone() : t; }));
    }
    return host;
  };
  const bool may_wait = !draws(op.schema());
  if (may_wait && writes_in_place(op)) {
    Stack returned;
    for (std::size_t i = 0; i < op.schema().returns().size(); ++i) {
      for (std::size_t j = 0; j < count; ++j) {
        const auto* alias = op.schema().arguments()[j].alias_info();
        if (alias != nullptr && *alias == *op.schema().returns()[i].alias_info()) {
          returned.push_back((*stack)[stack->size() - count + j]);
          break;
        }
      }
    }
    on_stream(stream, [op, host = deferred()]() mutable { op.redispatchBoxed(CPU, &host); });
    torch::jit::drop(*stack, count);
    stack->insert(stack->end(), returned.begin(), returned.end());
    return;
  }
  if (std::optional<Stack> results; may_wait && (results = shapes(op, *stack, count, arguments.device()))) {
    // Their memory is what the allocator gave to this stream: what frees them frees it in the stream's order.
    Stack to;
    for (const IValue& value : *results) {
      to.push_back(with_tensors(value, [](const at::Tensor& t) { return t.defined() && t.numel() > 0 ? as_host(t) : t; }));
    }
    on_stream(stream, [op, host = deferred(), to]() mutable {
      op.redispatchBoxed(CPU, &host);
      for (std::size_t i = 0; i < to.size(); ++i) {
        std::vector<at::Tensor> from;
        (void)with_tensors(host[i], [&](const at::Tensor& t) { return from.emplace_back(t); });
        std::size_t next = 0;
        (void)with_tensors(to[i], [&](const at::Tensor& t) {
          const at::Tensor& source = from[next++];
          if (t.defined() && t.is_cpu()) {
            t.copy_(source);
          }
          return t;
        });
      }
    });
    torch::jit::drop(*stack, count);
    stack->insert(stack->end(), results->begin(), results->end());
    return;
  }
  cudaStreamSynchronize(stream);
  Stack host = arguments.host();
  op.redispatchBoxed(CPU, &host);
  torch::jit::drop(*stack, count);
  for (const IValue& value : host) {
    stack->push_back(with_tensors(value, [&](const at::Tensor& t) { return arguments.back(t); }));
  }
}

// Between devices and the host.
at::Tensor& copy_into(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  if (to.numel() == 0) {
    return to;
  }
  const c10::Device device = to.is_cuda() ? to.device() : from.device();
  c10::DeviceGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  auto host = [](const at::Tensor& t) { return t.is_cuda() ? as_host(t) : t; };
  if (to.is_cuda() && from.is_cuda()) {
    if (to.device() != from.device()) {
      cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream(from.device().index()));
    }
    on_stream(stream, [to = host(to), from = host(from)] { to.copy_(from); });
  } else if (to.is_cuda()) {
    at::Tensor source = non_blocking && from.is_pinned() ? from : from.clone();
    on_stream(stream, [to = host(to), source] { to.copy_(source); });
  } else {
    on_stream(stream, [to, from = host(from)] { to.copy_(from); });
    if (!non_blocking || !to.is_pinned()) {
      cudaStreamSynchronize(stream);
    }
  }
  return to;
}
at::Tensor& copy_here(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  return copy_into(to, from, non_blocking);
}

struct Registration {
  std::vector<c10::RegistrationHandleRAII> handles;
  Registration() {
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      auto op = dispatcher.findSchema(name);
      const std::string text = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
      if (!op || text.rfind("aten::", 0) != 0 || kept().count(text) != 0 || !op->hasKernelForDispatchKey(DispatchKey::CUDA) ||
          !op->hasComputedKernelForDispatchKey(DispatchKey::CPU)) {
        continue;
      }
      handles.push_back(dispatcher.registerImpl(
          name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&in_place_of_kernel>(), std::nullopt, nullptr, "simulated"));
    }
    handles.push_back(dispatcher.registerImpl(
        {"aten::copy_", ""}, DispatchKey::CUDA,
        c10::KernelFunction::makeFromUnboxedRuntimeFunction(&copy_here), std::nullopt, nullptr, "simulated"));
  }
};
// Never taken back: streams run on while the process ends.
const auto* const registration = new Registration;
} // namespace
