// Random number generators of one's own.
#pragma once
#include <cstdint>
#include <memory>

namespace at {
class Tensor;
}
namespace tchd {
struct GeneratorParts;

class RandomGenerator {
 public:
  explicit RandomGenerator(std::unique_ptr<GeneratorParts> parts);
  ~RandomGenerator();
  void manual_seed(std::uint64_t seed) const;
  std::uint64_t initial_seed() const;
  /// A new tensor, which the caller owns.
  at::Tensor* state() const;
  void set_state(const at::Tensor& state) const;
  void randperm(const at::Tensor& out) const;
  void uniform(const at::Tensor& out, double low, double high) const;
  void normal(const at::Tensor& out, double mean, double std) const;
  void bernoulli(const at::Tensor& out, double p) const;
  void random(const at::Tensor& out, std::int64_t low, std::int64_t high) const;

 private:
  std::unique_ptr<GeneratorParts> parts_;
};

/// `cuda` is the index of a CUDA device, -1 for the CPU.
std::unique_ptr<RandomGenerator> new_generator(std::int32_t cuda, std::uint64_t seed);
} // namespace tchd
