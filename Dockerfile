# The toolkit with everything it needs, and its server:
#   CPU:         docker build -t minimind .
#   NVIDIA GPUs: docker build -t minimind:cuda --build-arg TORCH_INDEX= .
# Any other script, as the user with the number 1000 (another one: --user "$(id -u)"):
#   mkdir -p out && docker run --rm -v ./dataset:/minimind/dataset -v ./out:/minimind/out minimind python 1-pretrain.py
FROM python:3.12-slim

# This index has PyTorch without CUDA, which is much smaller; pip's own index (an empty TORCH_INDEX) has it with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The decoding kernels are compiled at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /minimind
# torch first and alone, as in setup_env.sh; these layers are only built again when the requirements change.
COPY requirements.txt .
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" \
    && pip install --no-cache-dir -r requirements.txt

COPY . .
# The usual number of the first user, so that files in mounted folders belong to them.
RUN useradd --create-home --uid 1000 minimind && mkdir -p out && chown -R minimind out dataset
USER 1000

EXPOSE 8000
# Listens inside the container; who can reach it depends on how its port is published (compose.yaml: this machine only).
CMD ["python", "my_openai_api.py", "--host", "0.0.0.0"]
