#include "vec_scalar.h"
#include "layer.h"
#include "linear.h"

void moeq::run_scalar(Call* call, int thread, int threads) { run(call, thread, threads); }
void moeq::run_linear_scalar(LinearCall* call, int thread, int threads) { run_linear(call, thread, threads); }
