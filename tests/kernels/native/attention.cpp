// Attention of odd lengths: the mean of equal values is that value, and no memory but its own is touched.
#include <cstdint>
#include <vector>

#include "../../../smelter/kernels/cpu/attention.cpp"

int main() {
  for (int length : {1, 5, 63, 64, 65, 200}) {
    for (float cap : {0.0f, 50.0f, 100.0f}) {
      for (bool in_documents : {false, true}) {
        const int batch = 2, heads = 4, kv_heads = 2, dim = 128;
        const std::size_t of_q = std::size_t(batch) * heads * length * dim, of_k = of_q / 2;
        std::vector<std::uint16_t> q(of_q, 0x3f80), k(of_k, 0x3f00), v(of_k, 0x3f80), out(of_q), grad(of_q, 0x3f80);
        std::vector<std::uint16_t> grad_q(of_q), grad_k(of_k), grad_v(of_k);
        std::vector<float> lse(batch * heads * length);
        std::vector<std::int32_t> docs(batch * length);
        for (std::size_t i = 0; i < docs.size(); ++i) docs[i] = int(i) / 50;
        const std::int32_t* where = in_documents ? docs.data() : nullptr;
        smelter_attention_forward(q.data(), k.data(), v.data(), where, out.data(), lse.data(), batch, heads, kv_heads,
                                  length, dim, 2, 0.1f, cap, cap != 50.0f);
        smelter_attention_backward(grad.data(), q.data(), k.data(), v.data(), out.data(), lse.data(), where,
                                   grad_q.data(), grad_k.data(), grad_v.data(), batch, heads, kv_heads, length, dim, 2,
                                   0.1f, cap);
        for (auto x : out) if (x != 0x3f80) return 2;  // equal values, so their mean
      }
    }
  }
}
