-- The table that the gateway reads. A platform usually has it already.
CREATE TABLE IF NOT EXISTS waiter_sector_assignment (
    id bigserial PRIMARY KEY,
    tenant_id bigint NOT NULL,
    branch_id bigint NOT NULL,
    sector_id bigint NOT NULL,
    waiter_id bigint NOT NULL,
    assignment_date date NOT NULL,
    shift text,
    is_active boolean NOT NULL DEFAULT true
);
CREATE INDEX IF NOT EXISTS waiter_sector_assignment_asked
    ON waiter_sector_assignment (tenant_id, branch_id, waiter_id, assignment_date);
