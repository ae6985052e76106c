#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#include "vec_avx512.h"
#include "layer.h"
#include "linear.h"

void moeq::run_avx512(Call* call, int thread, int threads) { run(call, thread, threads); }
void moeq::run_linear_avx512(LinearCall* call, int thread, int threads) { run_linear(call, thread, threads); }
