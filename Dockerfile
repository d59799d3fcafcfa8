# The HTTP API with the embedded model, on a CPU.
#
#     docker build -t how-sure .
#     docker run --rm -p 127.0.0.1:8000:8000 how-sure
#
# Adapters and an evaluation of your own are mounted: see docs/SERVING.md.
FROM python:3.11-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -r requirements.txt
COPY *.py ./
COPY serving/ serving/
COPY tasks/ tasks/
COPY embedded_model/ embedded_model/
COPY evaluation_cache/ evaluation_cache/

RUN useradd --no-create-home --shell /usr/sbin/nologin howsure && mkdir adapters
USER howsure
# Inside a container the loopback address answers nobody; publish the port on 127.0.0.1 outside.
ENV HOWSURE_HOST=0.0.0.0 HOWSURE_PORT=8000
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["python", "classify_api.py"]
