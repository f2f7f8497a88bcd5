//! Local processes as workloads.
