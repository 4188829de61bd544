//! Seawall: a PostgreSQL WAL-streaming archiver. (The map is completed with the modules.)

pub mod agent;
pub mod archiver;
pub mod catalog;
pub mod cli;
pub mod codec;
pub mod config;
pub mod continuity;
pub mod error;
pub mod postgres;
pub mod receiver;
pub mod replication;
pub mod repository;
pub mod restore;
pub mod secret;
pub mod telemetry;
pub mod testkit;
pub mod wal;
