#pragma GCC target("avx2,fma,f16c")
#include "vec_avx2.h"
#include "layer.h"
#include "linear.h"

void moeq::run_avx2(Call* call, int thread, int threads) { run(call, thread, threads); }
void moeq::run_linear_avx2(LinearCall* call, int thread, int threads) { run_linear(call, thread, threads); }
