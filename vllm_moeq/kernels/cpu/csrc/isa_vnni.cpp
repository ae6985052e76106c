#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define MOEQ_VNNI
#include "vec_avx512.h"
#include "layer.h"
#include "linear.h"

void moeq::run_vnni(Call* call, int thread, int threads) { run(call, thread, threads); }
void moeq::run_linear_vnni(LinearCall* call, int thread, int threads) { run_linear(call, thread, threads); }
