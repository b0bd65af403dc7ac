// The peer of bench_index.py: the sample index and the blend as plain loops, as GPT-NeoX and Megatron-LM compute them.
#include <algorithm>
#include <cstdint>

extern "C" void plain_sample_index(const int32_t* sizes, const int32_t* order, int64_t seq_length, int64_t rows,
                                   int32_t* out) {
    int64_t position = 0, offset = 0;
    out[0] = out[1] = 0;
    for (int64_t row = 1; row < rows; ++row) {
        int64_t remaining = seq_length;  // tokens to go until the sample after this one starts
        while (remaining > 0) {
            const int64_t left = sizes[order[position]] - offset;
            if (left > remaining) {
                offset += remaining;
                remaining = 0;
            } else {
                remaining -= left;
                ++position;
                offset = 0;
            }
        }
        // A sample that starts where a document ends starts with the next one that has tokens.
        while (sizes[order[position]] == 0) ++position;
        out[2 * row] = static_cast<int32_t>(position);
        out[2 * row + 1] = static_cast<int32_t>(offset);
    }
}

extern "C" void plain_blend(const double* weights, int64_t num_datasets, int64_t size, int32_t* dataset,
                            int64_t* sample, int64_t* taken) {
    std::fill(taken, taken + num_datasets, 0);
    for (int64_t i = 0; i < size; ++i) {
        const double scale = std::max(static_cast<double>(i), 1.0);
        int64_t best = 0;
        double largest = weights[0] * scale - static_cast<double>(taken[0]);
        for (int64_t k = 1; k < num_datasets; ++k) {
            const double lag = weights[k] * scale - static_cast<double>(taken[k]);
            if (lag > largest) largest = lag, best = k;
        }
        dataset[i] = static_cast<int32_t>(best);
        sample[i] = taken[best]++;
    }
}
