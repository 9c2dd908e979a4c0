CREATE TABLE IF NOT EXISTS hand_templates (template_id {text} PRIMARY KEY);
CREATE TABLE IF NOT EXISTS hand_requests (
    request_id {text} PRIMARY KEY, template_id {text} REFERENCES hand_templates (template_id),
    status {text}, request_type {text}, created_at {text}, updated_at {text},
    machine_count BIGINT, version BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS hand_machines (
    machine_id {text} PRIMARY KEY, request_id {text} REFERENCES hand_requests (request_id),
    template_id {text} REFERENCES hand_templates (template_id), return_request_id {text},
    name {text}, status {text}, instance_type {text}, provider_instance_id {text},
    private_ip {text}, public_ip {text}, started_at {text}, terminated_at {text},
    created_at {text}, updated_at {text}, doc {document}, version BIGINT NOT NULL);
CREATE INDEX IF NOT EXISTS hand_requests_type ON hand_requests (request_type);
CREATE INDEX IF NOT EXISTS hand_requests_status ON hand_requests (status, created_at);
CREATE INDEX IF NOT EXISTS hand_requests_created ON hand_requests (created_at);
CREATE INDEX IF NOT EXISTS hand_requests_template ON hand_requests (template_id, created_at);
CREATE INDEX IF NOT EXISTS hand_machines_name ON hand_machines (name);
CREATE INDEX IF NOT EXISTS hand_machines_request ON hand_machines (request_id, created_at);
CREATE INDEX IF NOT EXISTS hand_machines_return ON hand_machines (return_request_id);
CREATE INDEX IF NOT EXISTS hand_machines_status ON hand_machines (status, created_at);
CREATE INDEX IF NOT EXISTS hand_machines_created ON hand_machines (created_at)
