-- The schema of an outbox of format 1, as pybustcall 0.1.0a1 made it. It is never changed: files like this exist.
CREATE TABLE busts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    destination TEXT NOT NULL,
    line BLOB NOT NULL,
    target TEXT NOT NULL,
    namespace TEXT,
    kind TEXT NOT NULL,
    strategy TEXT NOT NULL,
    soft INTEGER NOT NULL,
    fault_tolerance INTEGER NOT NULL,
    key TEXT NOT NULL,
    state INTEGER NOT NULL,
    head INTEGER NOT NULL,
    sent INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    joined REAL NOT NULL,
    not_before REAL NOT NULL,
    owner TEXT,
    leased_at REAL,
    lease_until REAL,
    reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX lines ON busts (line, id) WHERE state < 3;
CREATE INDEX ready ON busts (destination, id) WHERE state = 0 AND head = 1;
CREATE INDEX waits ON busts (not_before) WHERE state = 1;
CREATE INDEX leases ON busts (lease_until) WHERE state = 2;
CREATE INDEX grants ON busts (leased_at) WHERE state = 2;
CREATE INDEX joinable ON busts (line, strategy, soft) WHERE state < 2 AND sent = 0 AND owner IS NULL;
CREATE INDEX ages ON busts (joined) WHERE state < 3;
CREATE INDEX births ON busts (created) WHERE state < 3;

CREATE TABLE tally (state INTEGER PRIMARY KEY, rows INTEGER NOT NULL);
INSERT INTO tally VALUES (0, 0), (1, 0), (2, 0), (3, 0);

CREATE TRIGGER row_came AFTER INSERT ON busts BEGIN
    UPDATE tally SET rows = rows + 1 WHERE state = new.state;
END;
CREATE TRIGGER row_changed AFTER UPDATE OF state ON busts WHEN new.state <> old.state BEGIN
    UPDATE tally SET rows = rows - 1 WHERE state = old.state;
    UPDATE tally SET rows = rows + 1 WHERE state = new.state;
END;
CREATE TRIGGER row_went AFTER DELETE ON busts BEGIN
    UPDATE tally SET rows = rows - 1 WHERE state = old.state;
    UPDATE busts SET head = 1
     WHERE old.head = 1 AND id = (SELECT min(id) FROM busts WHERE line = old.line AND state < 3);
END;
CREATE TRIGGER row_left_its_line AFTER UPDATE OF state ON busts WHEN new.state = 3 AND old.state < 3 BEGIN
    UPDATE busts SET head = 0 WHERE id = new.id;
    UPDATE busts SET head = 1
     WHERE old.head = 1 AND id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3);
END;
CREATE TRIGGER row_came_back AFTER UPDATE OF state ON busts WHEN new.state < 3 AND old.state = 3 BEGIN
    UPDATE busts SET head = 0
     WHERE id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3 AND id <> new.id);
    UPDATE busts SET head = 1 WHERE id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3);
END;
PRAGMA application_id = 0x70624F42;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
