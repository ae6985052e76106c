#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq")
#include "shorts_avx512.h"

#include "encode.h"

void moeq::encode_avx512(const EncodeCall& call) { encode_tiles(call); }
