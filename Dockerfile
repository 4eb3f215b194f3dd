# On a processor:  docker build -t specexec .
# On NVIDIA GPUs:  docker build -t specexec:cuda --build-arg TORCH=https://download.pytorch.org/whl/cu128 .
# The wheels of torch bring CUDA along; the host needs its driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch --index-url "$TORCH"

RUN --mount=type=bind,target=/src,rw pip install --no-cache-dir '/src[serve]'

# Models, conversations and what was learned: everything worth keeping is in one volume.
ENV HF_HOME=/models/huggingface SPECEXEC_HOME=/models/specexec
RUN useradd --uid 1000 --create-home user && mkdir /models && chown user /models
USER 1000
WORKDIR /home/user
VOLUME /models
EXPOSE 8000

ENTRYPOINT ["specexec"]
# From outside the container a key is asked for: -e SPECEXEC_API_KEY=...
CMD ["serve", "--host", "0.0.0.0"]
