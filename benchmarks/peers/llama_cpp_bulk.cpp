// Greedy continuous batching over the C API of llama.cpp; an end-of-sequence token ends nothing.
//   llama_cpp_bulk MODEL.gguf OUTPUT_TOKENS SEQUENCES TOKENS_PER_SEQUENCE BATCH_TOKENS THREADS < prompts
// Standard input: token ids, a prompt per line. Standard output: seconds, then the output ids, a prompt per line.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

using Tokens = std::vector<llama_token>;

struct Slot {
    int prompt = -1;  // index of its prompt; -1: free
    size_t num_read = 0;  // prompt tokens that were given to the model
    llama_pos position = 0;
    llama_token last = 0;
};

struct Wanted {
    int slot;
    int place;  // of its logits in the batch
};

struct Driver {
    llama_context *context;
    llama_batch batch;
    int vocab_size, num_slots, batch_tokens;

    int add(llama_token token, llama_pos position, int slot, bool wants_logits) {
        int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = slot;
        batch.logits[i] = wants_logits;
        return i;
    }

    llama_token most_likely(int place) const {
        const float *logits = llama_get_logits_ith(context, place);
        return llama_token(std::max_element(logits, logits + vocab_size) - logits);
    }

    void fill(std::vector<Slot> &slots, const std::vector<Tokens> &prompts, std::vector<Wanted> &wanted, size_t &next) {
        batch.n_tokens = 0;
        for (int s = 0; s < num_slots; s++) {
            Slot &slot = slots[s];
            if (slot.prompt >= 0 && slot.num_read == prompts[slot.prompt].size())
                wanted.push_back({s, add(slot.last, slot.position++, s, true)});
        }
        for (int s = 0; s < num_slots && batch.n_tokens < batch_tokens; s++) {
            Slot &slot = slots[s];
            if (slot.prompt < 0 && next < prompts.size()) {
                slot = Slot();
                slot.prompt = int(next++);
            }
            if (slot.prompt < 0) continue;
            const Tokens &prompt = prompts[slot.prompt];
            while (slot.num_read < prompt.size() && batch.n_tokens < batch_tokens) {
                llama_token token = prompt[slot.num_read++];
                bool is_last = slot.num_read == prompt.size();
                int place = add(token, slot.position++, s, is_last);
                if (is_last) wanted.push_back({s, place});
            }
        }
    }

    std::vector<Tokens> generate(const std::vector<Tokens> &prompts, size_t num_output) {
        llama_memory_t memory = llama_get_memory(context);
        llama_memory_clear(memory, false);
        std::vector<Tokens> outputs(prompts.size());
        std::vector<Slot> slots(num_slots);
        for (size_t next = 0, finished = 0; finished < prompts.size();) {
            std::vector<Wanted> wanted;
            fill(slots, prompts, wanted, next);
            if (llama_decode(context, batch) != 0) {
                std::fprintf(stderr, "llama_decode failed\n");
                std::exit(1);
            }
            for (const Wanted &one : wanted) {
                Slot &slot = slots[one.slot];
                slot.last = most_likely(one.place);
                outputs[slot.prompt].push_back(slot.last);
                if (outputs[slot.prompt].size() < num_output) continue;
                llama_memory_seq_rm(memory, one.slot, -1, -1);
                slot.prompt = -1;
                finished++;
            }
        }
        return outputs;
    }
};

static std::vector<Tokens> read_prompts() {
    std::vector<Tokens> prompts;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream stream(line);
        Tokens prompt;
        for (llama_token token; stream >> token;) prompt.push_back(token);
        prompts.push_back(prompt);
    }
    return prompts;
}

static void print_errors(ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int main(int argc, char **argv) {
    if (argc != 7) {
        std::fprintf(stderr, "usage: llama_cpp_bulk MODEL OUTPUT_TOKENS SEQUENCES LENGTH BATCH_TOKENS THREADS\n");
        return 2;
    }
    const int num_output = std::atoi(argv[2]), num_slots = std::atoi(argv[3]), length = std::atoi(argv[4]);
    const int batch_tokens = std::atoi(argv[5]), threads = std::atoi(argv[6]);
    llama_backend_init();
    llama_log_set(print_errors, nullptr);
    llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = uint32_t(num_slots) * uint32_t((length + 255) / 256 * 256);  // llama.cpp rounds slots to 256
    params.n_batch = params.n_ubatch = uint32_t(batch_tokens);
    params.n_seq_max = uint32_t(num_slots);
    params.n_threads = params.n_threads_batch = threads;
    llama_context *context = llama_init_from_model(model, params);
    if (!context) return 1;
    const int vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    Driver driver{context, llama_batch_init(batch_tokens, 0, 1), vocab_size, num_slots, batch_tokens};
    const std::vector<Tokens> prompts = read_prompts();
    driver.generate({prompts.begin(), prompts.begin() + std::min<size_t>(2, prompts.size())}, 4);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<Tokens> outputs = driver.generate(prompts, size_t(num_output));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%.6f\n", seconds.count());
    for (const Tokens &output : outputs) {
        for (llama_token token : output) std::printf("%d ", token);
        std::printf("\n");
    }
}
