"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
CONFIDENCES = tuple(round(0.05 * i, 2) for i in range(1, 21))


class Metrics:
    """The measurements of one server, in a registry of their own.

    The confidence of the answers is counted by model: when its distribution moves away from that of
    the calibration rows, the texts have changed, and the calibrator may not hold for them.
    """

    def __init__(self, queue, loaded_adapters):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "howsure_requests", "Answered requests.", ["endpoint", "method", "status"], **own
        )
        self.problems = Counter("howsure_problems", "Answers that are problems.", ["kind"], **own)
        self.request_seconds = Histogram(
            "howsure_request_seconds",
            "From the arrival of a request to its answer.",
            ["endpoint"],
            buckets=SECONDS,
            **own,
        )
        self.batch_rows = Histogram(
            "howsure_batch_rows", "Texts scored in one batch.", buckets=ROWS, **own
        )
        self.batch_tokens = Histogram(
            "howsure_batch_tokens", "Tokens scored in one batch.", buckets=TOKENS, **own
        )
        self.batch_seconds = Histogram(
            "howsure_batch_seconds", "Duration of one batch.", buckets=SECONDS, **own
        )
        self.confidence = Histogram(
            "howsure_confidence",
            "Probability of the answered label among the labels.",
            ["model", "kind"],
            buckets=CONFIDENCES,
            **own,
        )
        for name, text, value in (
            ("howsure_waiting_rows", "Texts that wait.", lambda: queue.rows),
            ("howsure_waiting_tokens", "Tokens that wait.", lambda: queue.tokens),
            ("howsure_adapters_in_memory", "Adapters in memory.", loaded_adapters),
        ):
            Gauge(name, text, **own).set_function(value)

    def observe_batch(self, rows, tokens, seconds):
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def observe_answer(self, answer):
        self.confidence.labels(answer.model, "raw").observe(answer.raw_probability)
        if answer.calibrated_probability is not None:
            self.confidence.labels(answer.model, "calibrated").observe(
                answer.calibrated_probability
            )
