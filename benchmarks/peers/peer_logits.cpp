// Logits of a peer, token by token: peer_logits MODEL.gguf OUT.f32 THREADS TOKEN...
// Built against a checkout of llama.cpp or ik_llama.cpp (MOEFUSE_IK) by compare.py.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc < 5) return std::fprintf(stderr, "peer_logits MODEL OUT THREADS TOKEN...\n"), 2;
  llama_backend_init();
  llama_model_params model_params = llama_model_default_params();
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_threads = params.n_threads_batch = std::atoi(argv[3]);
#ifdef MOEFUSE_IK  // its own fast settings: -rtr 1 -fmoe 1 (and -mla 3 where the model has it)
  model_params.repack_tensors = true;
  model_params.mla = params.mla_attn = 3;
  params.fused_moe_up_gate = true;
  params.flash_attn = true;
#endif
#ifndef MOEFUSE_IK  // llama-bench's --repack 0
  model_params.use_extra_bufts = !std::getenv("MOEFUSE_PEER_NO_REPACK");
#endif
  llama_model* model = llama_model_load_from_file(argv[1], model_params);
  llama_context* context = model ? llama_init_from_model(model, params) : nullptr;
  std::FILE* out = std::fopen(argv[2], "wb");
  if (!context || !out) return std::fprintf(stderr, "cannot open %s\n", argv[1]), 1;
#ifdef MOEFUSE_IK
  const int vocab = llama_n_vocab(model);
#else
  const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
#endif
  llama_batch batch = llama_batch_init(1, 0, 1);
  for (int i = 4; i < argc; ++i) {
    batch.n_tokens = 1;
    batch.token[0] = std::atoi(argv[i]);
    batch.pos[0] = i - 4;
    batch.n_seq_id[0] = 1;
    batch.seq_id[0][0] = 0;
    batch.logits[0] = 1;
    if (llama_decode(context, batch) != 0) return 1;
    std::fwrite(llama_get_logits_ith(context, 0), sizeof(float), vocab, out);
  }
  return std::fclose(out);
}
