// Register a device guard for CUDA that switches no device: a torch built without CUDA lets no "cuda:0" tensor through
// its operators otherwise, not even one that has no memory.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstddef>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

struct NoOpGuard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, 0}; }
};

const NoOpGuard guard;

}  // namespace

extern "C" const void* exchange_cuda_guard(const void* wanted) {
  const auto* next = static_cast<const c10::impl::DeviceGuardImplInterface*>(wanted);
  return c10::impl::device_guard_impl_registry[static_cast<std::size_t>(CUDA)].exchange(next);
}

extern "C" const void* no_op_cuda_guard() { return static_cast<const c10::impl::DeviceGuardImplInterface*>(&guard); }
