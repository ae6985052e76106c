#define MOEQ_VNNI
#include "emulated_avx512.h"
#include "vec_avx512.h"
#include "layer.h"
#include "linear.h"

void moeq::run_vnni(Call* call, int thread, int threads) { run(call, thread, threads); }
void moeq::run_linear_vnni(LinearCall* call, int thread, int threads) { run_linear(call, thread, threads); }
