# On a processor:  docker build -t specexec .
# On NVIDIA GPUs:  docker build -t specexec:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu128 .
# The wheels of torch bring CUDA along; the host needs its driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch --index-url "$TORCH"

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir '.[serve]' && rm -rf /src

# Models, conversations and what was learned: everything worth keeping is in one volume.
ENV HF_HOME=/models/huggingface SPECEXEC_HOME=/models/specexec
RUN useradd --create-home user && mkdir /models && chown user /models
USER user
WORKDIR /home/user
VOLUME /models
EXPOSE 8000

ENTRYPOINT ["specexec"]
# From outside the container a key is asked for: -e SPECEXEC_API_KEY=...
CMD ["serve", "--host", "0.0.0.0"]
