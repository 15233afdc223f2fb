// What llama.cpp's samplers leave of given logits: llama_infill MODEL IN OUT
//
// IN holds cases of 32-bit values: top_k (int), top_p and min_p (floats), then a logit for each token of the vocabulary.
// The samplers top_k, top_p, min_p and infill are applied, in llama.cpp's order. OUT gets for each case the number of
// tokens that are left and their ids.

#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

static void require(bool fine, const char * what) {
    if (!fine) {
        std::fprintf(stderr, "llama_infill: %s\n", what);
        std::exit(1);
    }
}

int main(int argc, char ** argv) {
    require(argc == 4, "usage: llama_infill MODEL IN OUT");
    std::FILE * in = std::fopen(argv[2], "rb");
    std::FILE * out = std::fopen(argv[3], "wb");
    require(in && out, "cannot open IN or OUT");
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    require(model, "cannot load MODEL");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<float> logits(llama_vocab_n_tokens(vocab));
    for (int32_t top_k; std::fread(&top_k, sizeof top_k, 1, in) == 1;) {
        float limits[2];
        require(std::fread(limits, sizeof(float), 2, in) == 2, "IN is cut off");
        require(std::fread(logits.data(), sizeof(float), logits.size(), in) == logits.size(), "IN is cut off");
        llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        llama_sampler_chain_add(chain, llama_sampler_init_top_k(top_k));
        llama_sampler_chain_add(chain, llama_sampler_init_top_p(limits[0], 0));
        llama_sampler_chain_add(chain, llama_sampler_init_min_p(limits[1], 0));
        llama_sampler_chain_add(chain, llama_sampler_init_infill(vocab));
        std::vector<llama_token_data> tokens(logits.size());
        for (size_t i = 0; i < logits.size(); i++) {
            tokens[i] = {llama_token(i), logits[i], 0};
        }
        llama_token_data_array left = {tokens.data(), tokens.size(), -1, false};
        llama_sampler_apply(chain, &left);
        const int32_t count = left.size;
        require(std::fwrite(&count, sizeof count, 1, out) == 1, "cannot write OUT");
        for (size_t i = 0; i < left.size; i++) {
            require(std::fwrite(&left.data[i].id, sizeof(int32_t), 1, out) == 1, "cannot write OUT");
        }
        llama_sampler_free(chain);
    }
    require(std::fclose(out) == 0, "cannot write OUT");
    llama_model_free(model);
}
