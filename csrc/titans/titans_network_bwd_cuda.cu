#include "titans/titans_cuda.h"
#include "titans/titans_network_launch.cuh"
namespace hope {
int64_t titans_network_bwd_cuda_scratch(const TitansParams&) { return 0; }
void titans_network_bwd_cuda(const TitansParams&, void*, void*) {}
}
