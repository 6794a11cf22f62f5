# moai in a container: CPU by default, CUDA by build argument.
#
#   docker build -t moai .
#   docker build -t moai --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm -v "$PWD/outputs:/outputs" moai prepare --dataset data/demo --tokenizer_path tokenizers/demo --cache_dir /outputs/cache
#   docker run --rm --entrypoint torchrun moai --nproc_per_node 2 train.py --config configs/demo.yaml --output_dir /tmp/demo --cache_dir /tmp/cache
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /moai
COPY . .
RUN MOAI_TORCH_INDEX=$TORCH_INDEX PIP_NO_CACHE_DIR=1 scripts/bootstrap.sh

# No home, and nothing in /moai may be written: name --cache_dir and --output_dir elsewhere.
USER nobody
ENV PATH=/moai/.venv/bin:$PATH HF_HOME=/tmp/huggingface
ENTRYPOINT ["moai"]
CMD ["--help"]
