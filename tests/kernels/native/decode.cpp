// Layers whose sizes fill no chunk and no tile: numbers stay small, and no memory but its own is touched.
#include <vector>

#include "../../../smelter/kernels/cpu/decode.cpp"

using namespace smelter;
struct Store { std::vector<std::uint8_t> packed; std::vector<float> scales; };
static Linear linear(Store& store, int outputs, int inputs) {
  const int rows = (outputs + 3) / 4 * 4, chunks = (inputs + 255) / 256;
  store.packed.assign(std::size_t(rows) * chunks * 64, 0x59);
  store.scales.assign(rows, 0.01f);
  return {store.packed.data(), store.scales.data(), outputs, inputs};
}
int main() {
  for (int blocks : {0, 1}) {
    for (int rows : {1, 2, 5, 9}) {
      const int heads = blocks ? 8 : 3, kv_heads = 1, dim = 32, size = blocks ? 256 : 80, inner = blocks ? 512 : 272;
      const int vocabulary = 11, slots = 4, max_len = 7;
      std::vector<Store> stores(4);
      std::vector<float> gain(2048, 1.0f), embedding(vocabulary * size, 0.5f), table(max_len * dim, 0.7f);
      DecoderLayer layer{linear(stores[0], (heads + 2 * kv_heads) * dim, size), linear(stores[1], size, heads * dim),
                         linear(stores[2], 2 * inner, size), linear(stores[3], size, inner),
                         gain.data(), gain.data(), nullptr, gain.data(), gain.data(), nullptr};
      std::vector<DecoderLayer> layers(2, layer);
      Decoder decoder{layers.data(), embedding.data(), gain.data(), table.data(), table.data(), 2, size, heads,
                      kv_heads, dim, inner, blocks, 1e-6f, blocks ? 50.0f : 0.0f};
      std::vector<std::int64_t> tokens(rows, 10), in_slots(rows), positions(rows);
      for (int i = 0; i < rows; ++i) in_slots[i] = i % slots, positions[i] = std::min(i / slots * 3, max_len - 1);
      std::vector<float> keys(2 * slots * kv_heads * max_len * dim), values(keys), hidden(rows * size);
      smelter_decode(&decoder, tokens.data(), in_slots.data(), positions.data(), rows, keys.data(), values.data(), slots,
                     max_len, 2, hidden.data());
      for (float x : hidden) if (!(std::fabs(x) < 100.0f)) return 2;
    }
  }
}
