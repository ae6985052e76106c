#include "shorts_scalar.h"

#include "encode.h"

void moeq::encode_scalar(const EncodeCall& call) { encode_tiles(call); }
