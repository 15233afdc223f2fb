// The logits that llama.cpp computes for every token of given sequences: llama_logits MODEL IN OUT f16|f32
//
// IN holds 32-bit numbers: for each sequence its length, then its token ids. OUT gets a row of float32 logits for each
// token, in order. The last argument is what attention computes in: f16 is llama.cpp's own choice, f32 turns flash
// attention off and keeps the KV cache in float32. Each sequence is one batch and begins with an empty cache.

#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static void require(bool fine, const char * what) {
    if (!fine) {
        std::fprintf(stderr, "llama_logits: %s\n", what);
        std::exit(1);
    }
}

int main(int argc, char ** argv) {
    require(argc == 5, "usage: llama_logits MODEL IN OUT f16|f32");
    std::FILE * in = std::fopen(argv[2], "rb");
    std::FILE * out = std::fopen(argv[3], "wb");
    require(in && out, "cannot open IN or OUT");
    std::vector<std::vector<llama_token>> sequences;
    uint32_t longest = 0;
    for (int32_t length; std::fread(&length, sizeof length, 1, in) == 1;) {
        require(length > 0, "a sequence without tokens");
        sequences.emplace_back(length);
        require(std::fread(sequences.back().data(), sizeof(llama_token), length, in) == size_t(length), "IN is cut off");
        longest = length > int32_t(longest) ? length : longest;
    }

    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    require(model, "cannot load MODEL");
    const int vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = longest;
    params.n_threads = params.n_threads_batch = 1;
    if (!std::strcmp(argv[4], "f32")) {
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; // it would compute in f16 all the same
    }
    llama_context * context = llama_init_from_model(model, params);
    require(context, "cannot make a context");
    for (const auto & tokens : sequences) {
        llama_memory_clear(llama_get_memory(context), true);
        llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
        batch.n_tokens = tokens.size();
        for (size_t i = 0; i < tokens.size(); i++) {
            batch.token[i] = tokens[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        require(llama_decode(context, batch) == 0, "cannot compute");
        for (size_t i = 0; i < tokens.size(); i++) {
            const float * row = llama_get_logits_ith(context, i);
            require(row && std::fwrite(row, sizeof(float), vocab_size, out) == size_t(vocab_size), "cannot write OUT");
        }
        llama_batch_free(batch);
    }
    require(std::fclose(out) == 0, "cannot write OUT");
    llama_free(context);
    llama_model_free(model);
}
