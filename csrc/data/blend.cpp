#include "data/blend.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "data/fault.h"

namespace neox::data {

void blend(const double* weights, int64_t num_datasets, int64_t first, int64_t count, int64_t* taken, int32_t* dataset, int64_t* sample) {
    std::vector<int32_t> active;
    for (int64_t k = 0; k < num_datasets; ++k) {
        if (!std::isfinite(weights[k]) || weights[k] < 0)
            throw Fault("bad weight of a dataset").at("dataset " + std::to_string(k)).found(std::to_string(weights[k])).expected("a finite number >= 0");
        if (weights[k] > 0) active.push_back(static_cast<int32_t>(k));
    }
    if (active.empty()) throw Fault("no dataset has a weight above 0").found(std::to_string(num_datasets) + " datasets");
    for (int64_t i = 0; i < count; ++i) {
        const auto scale = static_cast<double>(std::max<int64_t>(first + i, 1));
        int32_t best = active[0];
        double largest = -INFINITY;
        for (const int32_t k : active) {
            // Built with -ffp-contract=off: a fused multiply-add would round differently and pick other datasets.
            const double target = weights[k] * scale;
            const double lag = target - static_cast<double>(taken[k]);
            if (lag > largest) largest = lag, best = k;
        }
        dataset[i] = best;
        sample[i] = taken[best]++;
    }
}

}  // namespace neox::data
