// A Mamba model in C++ without Python: reads a prompt token by token, then writes the likeliest tokens.
//
//     mambakit export MODEL mamba.pt2 --to aoti
//     generate mamba.pt2 LAYERS D K N COUNT TOKEN...
//
// It prints token ids; a tokenizer's C++ library (tokenizers, sentencepiece) turns them into text.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
  if (count < 8) {
    std::cerr << "usage: generate PACKAGE LAYERS D K N COUNT TOKEN...\n";
    return 2;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const int64_t layers = std::atoll(arguments[2]), d = std::atoll(arguments[3]);
  const int64_t k = std::atoll(arguments[4]), n = std::atoll(arguments[5]), wanted = std::atoll(arguments[6]);
  torch::Tensor conv = torch::zeros({layers, 1, d, k - 1}), ssm = torch::zeros({layers, 1, d, n}), logits;
  auto read = [&](int64_t token) {
    std::vector<torch::Tensor> out = model.run({torch::full({1, 1}, token, torch::kInt64), conv, ssm});
    logits = out[0];
    conv = out[1];
    ssm = out[2];
  };
  for (int i = 7; i < count; ++i) read(std::atoll(arguments[i]));
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t token = logits.argmax(-1).item<int64_t>();
    std::cout << token << (i + 1 < wanted ? ' ' : '\n');
    read(token);
  }
  return 0;
}
