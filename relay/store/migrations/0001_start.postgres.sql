-- Queues among what has ended: by default one row in five of the whole table must be dead before anything is
-- cleared away, and every claim walks over what was not. With 40,000 deliveries passing 300,000 ended ones, a
-- twentieth of the dead rows is left and the table and its indexes grow half as much.
ALTER TABLE deliveries SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0
);
ALTER TABLE generations SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0
);
