// gated_pool on the CPU: the kernels of gated_pool_cpu.inl compiled for three instruction sets, chosen at run time.
#include "gated_pool_cpu.h"

#include <cstddef>
#include <memory>

#include "../common/half.h"
#include "../common/projection.h"

namespace csg {
namespace {

// Memory for sums in fp32 beside a half-type result. Outside the kernels: no library template is instantiated there.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(new char[size_t(bytes)]) {}
  void* get() const { return bytes_.get(); }

 private:
  std::unique_ptr<char[]> bytes_;
};

}  // namespace
}  // namespace csg

#define CSG_KERNELS "../gated_pool/gated_pool_cpu.inl"
#include "../common/cpu_levels.h"

namespace csg {

void gated_pool_forward_cpu(const GatedPoolForward& p, ParallelFor parallel_for) {
  CSG_CALL_LEVEL(gated_pool_forward, p, parallel_for);
}
void gated_pool_backward_cpu(const GatedPoolBackward& p, ParallelFor parallel_for) {
  CSG_CALL_LEVEL(gated_pool_backward, p, parallel_for);
}

}  // namespace csg
