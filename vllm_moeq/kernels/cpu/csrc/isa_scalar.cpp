#include "vec_scalar.h"
#include "layer.h"

void moeq::run_scalar(Call* call, int thread, int threads) { run(call, thread, threads); }
