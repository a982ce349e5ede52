#include "decode_step.h"

#include <stdexcept>

#include "layout.h"
#include "step_kernel.cuh"

namespace moefuse::cuda {

template <class G>
__global__ __launch_bounds__(kThreads, 1) void step_kernel(const __grid_constant__ StepParams p) {
  step<G>(p, threadIdx.x, blockIdx.x);
}

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("[cuda " + what + "] " + cudaGetErrorString(status));
}

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, which, device), "device");
  return value;
}

// The code a waiting thread left behind: layer << 8 | stage, plus one.
std::string fault_name(unsigned code) {
  return std::string(kStageNames[((code - 1) & 0xff) % kStages]) + ", layer " +
         std::to_string((code - 1) >> 8);
}

}  // namespace

template <class G>
void* DecodeStep<G>::device(size_t bytes, int fill) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes), "memory");
  owned_.push_back(p);
  check(cudaMemset(p, fill, bytes), "memory");
  return p;
}

template <class G>
DecodeStep<G>::DecodeStep(const ModelPointers& model, int blocks) {
  const int sms = attribute(cudaDevAttrMultiProcessorCount);
  if (blocks < 0 || blocks > sms) {
    throw std::invalid_argument("[cuda step] blocks: expected 0 to " + std::to_string(sms) +
                                ", got " + std::to_string(blocks));
  }
  StepParams& p = params_;
  p.blocks = blocks ? blocks : sms;
  p.splits = std::min(kSplits, p.blocks / G::kKvHeads);
  p.layout = make_layout<G>(p.blocks, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  p.num_layers = static_cast<int>(model.layers.size());
  p.embed = model.embed, p.lm_head = model.lm_head, p.final_norm = model.final_norm;
  p.rope = model.rope, p.cache_stride = model.cache_stride, p.eps = model.eps;
  const size_t bytes = model.layers.size() * sizeof(Layer);
  void* layers = device(bytes, 0);
  check(cudaMemcpy(layers, model.layers.data(), bytes, cudaMemcpyHostToDevice), "memory");
  p.layers = static_cast<const Layer*>(layers);
  const RingWords n = ring_words<G>(p.blocks);
  auto ring = [&](size_t words) { return static_cast<uint32_t*>(device(4 * words, 0xff)); };
  p.x = {ring(n.hidden),  ring(n.middle), ring(n.qkv),
         ring(n.partial), ring(n.range),  ring(n.context),
         ring(n.scores),  ring(n.act),    static_cast<uint64_t*>(device(4 * n.keys, 0))};
  p.state = static_cast<State*>(device(sizeof(State), 0));
  p.logits = static_cast<float*>(device(G::kVocab * sizeof(float), 0xff));
  p.sampled = static_cast<int*>(device(kMaxTokens * sizeof(int), 0xff));
  check(cudaHostAlloc(&fault_, sizeof(unsigned), cudaHostAllocMapped), "memory");
  *fault_ = 0;
  check(cudaHostGetDevicePointer(&p.fault, fault_, 0), "memory");
  check(cudaFuncSetAttribute(step_kernel<G>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(p.layout.total)),
        "shared memory");
}

template <class G>
DecodeStep<G>::~DecodeStep() {
  for (void* p : owned_) cudaFree(p);
  if (fault_) cudaFreeHost(fault_);
}

template <class G>
void DecodeStep<G>::seek(int position, int token, cudaStream_t stream) {
  if (position < 0 || position >= params_.cache_stride) {
    throw std::invalid_argument("[cuda step] position: expected below " +
                                std::to_string(params_.cache_stride) + ", got " +
                                std::to_string(position));
  }
  if (token < 0 || token >= G::kVocab) {
    throw std::invalid_argument("[cuda step] token: expected below " + std::to_string(G::kVocab) +
                                ", got " + std::to_string(token));
  }
  const int values[2] = {position, token};
  check(cudaMemcpyAsync(&params_.state->position, values, sizeof values, cudaMemcpyHostToDevice,
                        stream),
        "seek");
  check(cudaStreamSynchronize(stream), "seek");
  host_position_ = position;
}

template <class G>
void DecodeStep<G>::run(int tokens, cudaStream_t stream) {
  if (tokens < 1 || tokens > kMaxTokens || host_position_ + tokens > params_.cache_stride) {
    throw std::invalid_argument("[cuda step] tokens: expected 1 to " + std::to_string(kMaxTokens) +
                                " inside a cache of " + std::to_string(params_.cache_stride) +
                                ", got " + std::to_string(tokens) + " at " +
                                std::to_string(host_position_));
  }
  params_.tokens = max_tokens_ = tokens;
  host_position_ += tokens;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(params_.blocks), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = params_.layout.total, config.stream = stream;
  cudaLaunchAttribute whole[1];  // every block must be resident: they wait for each other
  whole[0].id = cudaLaunchAttributeCooperative, whole[0].val.cooperative = 1;
  config.attrs = whole, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, step_kernel<G>, params_), "launch");
}

template <class G>
std::vector<int> DecodeStep<G>::sampled(cudaStream_t stream) {
  const cudaError_t status = cudaStreamSynchronize(stream);
  check(status, *fault_ ? fault_name(*fault_) : "step");
  std::vector<int> tokens(max_tokens_);
  check(cudaMemcpy(tokens.data(), params_.sampled, tokens.size() * sizeof(int),
                   cudaMemcpyDeviceToHost),
        "sampled");
  return tokens;
}

template <class G>
std::vector<long long> DecodeStep<G>::timeline() {
  std::vector<long long> cycles(int{kStages} * int{kParts});
  const size_t bytes = cycles.size() * sizeof(long long);
  if (!params_.timeline) {
    params_.timeline = static_cast<long long*>(device(bytes, 0));
    return cycles;
  }
  check(cudaMemcpy(cycles.data(), params_.timeline, bytes, cudaMemcpyDeviceToHost), "timeline");
  check(cudaMemset(params_.timeline, 0, bytes), "timeline");
  return cycles;
}

template class DecodeStep<Qwen3_30B_A3B>;

}  // namespace moefuse::cuda
