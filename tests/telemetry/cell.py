"""The two sides of the ledger, joined by queues instead of sockets: a test says when who dies and what has arrived."""

from collections import deque

from serve_app.runtime.tallies import SETTLE_S, EngineTallies, IngressBook


class Cell:
    """Ingress replicas by name, and their engine. Messages of each pair arrive in order, when `deliver` is called.

    With `is_prompt` they arrive at once.
    """

    def __init__(self, is_prompt=True):
        self.is_prompt = is_prompt
        self.now_s = 0.0
        self.books = {}
        self.inboxes = {}  # replica -> messages on their way to it
        self.outbox = deque()  # on their way to the engine
        self.engine = None
        self.counted = {}  # what the present engine counts
        self.num_engines = 0
        self._is_delivering = False
        self.start_engine()

    def start_engine(self):
        """A new one, which every replica finds in time. What the last one sent has arrived long before."""
        for name in self.books:
            self.deliver(name)
        self.engine = EngineTallies(self._to_replica, lambda: self.counted, lambda: self.now_s)
        self.counted = {}
        self.num_engines += 1
        for book in self.books.values():
            book.greet()
        self.deliver_all()
        self.now_s += SETTLE_S

    def stop_engine(self):
        """What it has sent arrives; what is on its way to it does not."""
        self.engine = None
        self.outbox.clear()
        for book in self.books.values():
            book.lose()

    def join(self, name):
        book = self.books[name] = IngressBook(name, self._to_engine, lambda: self.now_s)
        self.inboxes[name] = deque()
        if self.engine:
            book.greet()
        return book

    def kill(self, name):
        """What it has sent arrives."""
        del self.books[name], self.inboxes[name]

    def beat(self, seconds):
        """Time passes, and everybody does what is due by it."""
        self.now_s += seconds
        for book in self.books.values():
            book.beat()
        if self.engine:
            self.engine.tell()

    def deliver(self, name):
        """What is on its way to one replica."""
        while self.inboxes[name]:
            self.books[name].on(self.inboxes[name].popleft())

    def deliver_to_engine(self):
        while self.outbox and self.engine:
            self.engine.on(self.outbox.popleft())

    def deliver_all(self):
        self.deliver_to_engine()
        for name in self.books:
            self.deliver(name)

    def scrape(self, name):
        """What a replica shows: it asks the engine, if there is one, and waits for its answer."""
        if self.engine:
            self.books[name].ask()
            self.deliver_to_engine()
        self.deliver(name)
        return self.books[name].totals()

    def _to_engine(self, tally):
        if self.engine:
            self.outbox.append(tally)
            if self.is_prompt:
                self.deliver_to_engine()

    def _to_replica(self, name, tally):
        if name not in self.inboxes:
            return False
        self.inboxes[name].append(tally)
        if self.is_prompt:
            self.deliver(name)
        return True
