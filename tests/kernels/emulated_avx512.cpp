#include "emulated_avx512.h"
#include "vec_avx512.h"
#include "layer.h"

void moeq::run_avx512(Call* call, int thread, int threads) { run(call, thread, threads); }
