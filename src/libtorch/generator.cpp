#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randperm.h>
#include <c10/core/GradMode.h>

namespace tchd {
struct GeneratorParts {
  mutable at::Generator generator;
};

RandomGenerator::RandomGenerator(std::unique_ptr<GeneratorParts> parts) : parts_(std::move(parts)) {}
RandomGenerator::~RandomGenerator() = default;

// Drawing locks the generator itself; seeding and state are left to the caller.
void RandomGenerator::manual_seed(std::uint64_t seed) const {
  std::lock_guard<std::mutex> lock(parts_->generator.mutex());
  parts_->generator.set_current_seed(seed);
}
std::uint64_t RandomGenerator::initial_seed() const {
  std::lock_guard<std::mutex> lock(parts_->generator.mutex());
  return parts_->generator.current_seed();
}
at::Tensor* RandomGenerator::state() const {
  std::lock_guard<std::mutex> lock(parts_->generator.mutex());
  return new at::Tensor(parts_->generator.get_state());
}
void RandomGenerator::set_state(const at::Tensor& state) const {
  std::lock_guard<std::mutex> lock(parts_->generator.mutex());
  parts_->generator.set_state(state);
}
void RandomGenerator::randperm(const at::Tensor& out) const {
  c10::NoGradGuard no_grad;
  at::Tensor result = out;
  at::randperm_out(result, out.numel(), parts_->generator);
}
void RandomGenerator::uniform(const at::Tensor& out, double low, double high) const {
  c10::NoGradGuard no_grad;
  out.uniform_(low, high, parts_->generator);
}
void RandomGenerator::normal(const at::Tensor& out, double mean, double std) const {
  c10::NoGradGuard no_grad;
  out.normal_(mean, std, parts_->generator);
}
void RandomGenerator::bernoulli(const at::Tensor& out, double p) const {
  c10::NoGradGuard no_grad;
  out.bernoulli_(p, parts_->generator);
}
void RandomGenerator::random(const at::Tensor& out, std::int64_t low, std::int64_t high) const {
  c10::NoGradGuard no_grad;
  out.random_(low, high, parts_->generator);
}

std::unique_ptr<RandomGenerator> new_generator(std::int32_t cuda, std::uint64_t seed) {
  auto parts = std::make_unique<GeneratorParts>();
  if (cuda < 0) {
    parts->generator = at::detail::createCPUGenerator(seed);
  } else {
    // Through the hooks: nothing of libtorch_cuda is linked against.
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    parts->generator = at::globalContext()
                           .getAcceleratorHooksInterface(c10::DeviceType::CUDA)
                           .getNewGenerator(static_cast<c10::DeviceIndex>(cuda));
    parts->generator.set_current_seed(seed);
  }
  return std::make_unique<RandomGenerator>(std::move(parts));
}
} // namespace tchd
