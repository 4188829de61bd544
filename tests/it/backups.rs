//! Full backups of real servers, and what of them can be read with nothing but `age`, `zstd` and `tar`.
//!
//! The WAL and the lease are the agent's part: [`Ready`] stands in for it here.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use seawall::backup::{
    self, BackupError, BackupOptions, BackupPhase, BackupProgress, ConfigFile, Destination, NeededWal, Report, Request,
    Surroundings, WalStored,
};
use seawall::catalog::backup::{BackupFile, DeadFile, VolumeEntry};
use seawall::catalog::manifest::{ChecksumAlgorithm, FileHasher, Manifest};
use seawall::catalog::store::Archive;
use seawall::codec::Form;
use seawall::codec::encrypt::{Keys, Recipients};
use seawall::error::{Advice, ExitCode, Failure};
use seawall::replication::base_backup::{CompressionMethod, ServerCompression};
use seawall::replication::{Address, Connection, Login, NetDialer, Security, SessionKind, SslMode};
use seawall::repository::layout::{BackupId, BackupType, Lineage};
use seawall::repository::{Backend, Entry, Facts, Key, LocalBackend, S3Backend, StoreError, StoreErrorKind, Upload};
use seawall::wal::{Lsn, SystemId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::s3_conformance;
use crate::support::on_every_major;
use crate::support::postgres::{Installation, Server, Stop, available_majors, newest_major};
use crate::support::process::{self, Scratch};
use crate::support::rig::PATIENCE;
use crate::support::s3::S3Server;

// --- Taking one --------------------------------------------------------------------------------------------------

/// All WAL is there, and the lease is ours.
#[derive(Debug)]
struct Ready;

#[async_trait]
impl Surroundings for Ready {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    async fn wal_is_stored(&self, _: &str, needed: NeededWal) -> Result<WalStored, Failure> {
        assert!(needed.start < needed.stop);
        Ok(WalStored::default())
    }

    async fn lease_holds(&self, _: &str) -> Result<(), Failure> {
        Ok(())
    }
}

fn login(server: &Server) -> Login {
    Login {
        address: Address::Unix { directory: server.socket_dir(), port: server.port() },
        ssl_mode: SslMode::Disable,
        security: Security::default(),
        user: "postgres".into(),
        password: None,
        kind: SessionKind::Physical,
        application_name: "backup".into(),
        options: String::new(),
        connect_timeout: PATIENCE,
        answer_timeout: PATIENCE,
        keepalive: None,
        tcp_user_timeout: None,
    }
}

/// A server's backups in directories of their own.
struct Taking<'a> {
    server: &'a Server,
    scratch: Scratch,
    options: BackupOptions,
    config: Vec<ConfigFile>,
    keys: Keys,
    repositories: Vec<(String, Arc<dyn Backend>)>,
    lineage: Lineage,
}

impl<'a> Taking<'a> {
    fn of(server: &'a Server) -> Taking<'a> {
        let scratch = Scratch::new();
        let options = BackupOptions { volume_bytes: 8 << 20, store_patience: PATIENCE, ..BackupOptions::default() };
        let lineage = Lineage::new("main", SystemId(server.system_id().parse().expect("a number")), 1);
        let (config, keys, repositories) = (Vec::new(), Keys::default(), Vec::new());
        let mut taking = Taking { server, scratch, options, config, keys, repositories, lineage };
        taking.add_directory("one");
        taking
    }

    fn add_directory(&mut self, name: &str) -> PathBuf {
        let root = self.scratch.join(name);
        fs::create_dir(&root).expect("our directory can be made");
        self.repositories.push((name.to_owned(), Arc::new(LocalBackend::open(root.clone()))));
        root
    }

    fn lineage(&self) -> Lineage {
        self.lineage.clone()
    }

    fn archive(&self, index: usize) -> Archive {
        Archive::new(self.repositories[index].1.clone(), self.lineage()).with_keys(self.keys.clone())
    }

    fn request(&self) -> Request {
        let destination = |index: usize| Destination {
            name: self.repositories[index].0.clone(),
            archive: self.archive(index),
            lease: None,
        };
        Request {
            options: self.options.clone(),
            destinations: (0..self.repositories.len()).map(destination).collect(),
            slot_restart_lsn: Lsn(0),
            config: self.config.clone(),
            host: Some("here".to_owned()),
        }
    }

    async fn take_in(&self, surroundings: &dyn Surroundings, stop: &CancellationToken) -> Report {
        let (progress, _) = watch::channel(BackupProgress::default());
        self.take_with(surroundings, &progress, stop).await
    }

    async fn take_with(
        &self,
        surroundings: &dyn Surroundings,
        progress: &watch::Sender<BackupProgress>,
        stop: &CancellationToken,
    ) -> Report {
        let connection = Connection::open(&NetDialer, &login(self.server)).await.expect("a walsender");
        backup::take(connection, self.request(), surroundings, progress, stop).await
    }

    fn take(&self) -> Report {
        run(self.take_in(&Ready, &CancellationToken::new()))
    }

    /// One that is complete in all repositories: what it says of itself in the first.
    fn complete(&self) -> BackupFile {
        let report = self.take();
        let mut files = report
            .outcomes
            .into_iter()
            .map(|outcome| outcome.result.unwrap_or_else(|error| panic!("in {}: {error}", outcome.repository)));
        let file = files.next().expect("there is a repository");
        let record = run(self.archive(0).backup_record(file.id)).expect("it can be read");
        assert_eq!(record.complete(), Some(&file));
        file
    }

    /// One that is complete nowhere: the error, which is the first repository's.
    fn failure(&self) -> BackupError {
        let report = self.take();
        assert!(!report.is_complete_somewhere());
        if let Some(id) = report.id {
            self.assert_not_there(id);
        }
        report.outcomes.into_iter().next().expect("there is a repository").result.expect_err("it is not complete")
    }

    fn assert_not_there(&self, id: BackupId) {
        for index in 0..self.repositories.len() {
            let record = run(self.archive(index).backup_record(id)).expect("it can be read");
            assert_eq!(record.complete(), None);
        }
    }

    fn directory(&self, id: BackupId) -> PathBuf {
        self.scratch.join("one").join(self.lineage().backup(id).as_str())
    }

    fn path_of(&self, id: BackupId, volume: &VolumeEntry) -> PathBuf {
        let key = self.lineage().volume(id, volume.name(), volume.form);
        self.scratch.join("one").join(key.as_str())
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be made").block_on(work)
}

// --- Reading one, by hand ----------------------------------------------------------------------------------------

impl Taking<'_> {
    /// `zstd -d | tar -x` of every volume: a data directory, with its tablespaces in place.
    fn extract(&self, file: &BackupFile) -> PathBuf {
        let into = self.scratch.join(&format!("extracted-{}", file.id));
        for volume in &file.volumes {
            let target = match volume.tablespace {
                None => into.clone(),
                Some(oid) => into.join(format!("pg_tblspc/{oid}")),
            };
            fs::create_dir_all(&target).expect("our directory can be made");
            let path = self.path_of(file.id, volume);
            let stored = fs::read(&path).expect("the volume is there");
            assert_eq!(stored.len() as u64, volume.stored_bytes);
            assert_eq!(crc32fast::hash(&stored), volume.stored_crc32.0);
            let plain = match volume.form {
                Form::Plain => path,
                Form::Encrypted => self.decrypt(&path),
            };
            let raw = raw_of(&plain);
            assert_eq!(raw.len() as u64, volume.raw_bytes);
            assert_eq!(crc32fast::hash(&raw), volume.raw_crc32.0);
            untar(&raw, &target, &self.scratch.join("volume.tar"));
        }
        into
    }

    fn identity_file(&self) -> PathBuf {
        self.scratch.join("identity")
    }

    fn encrypt(&mut self) {
        use age::secrecy::ExposeSecret;
        let identity = age::x25519::Identity::generate();
        fs::write(self.identity_file(), identity.to_string().expose_secret()).expect("a test's file can be written");
        let recipients = Recipients::parse(&[identity.to_public().to_string()]).expect("a recipient");
        self.keys.recipients = Some(recipients);
    }

    fn decrypt(&self, path: &Path) -> PathBuf {
        let plain = self.scratch.join("plain");
        let mut age = Command::new("age");
        age.arg("-d").arg("-i").arg(self.identity_file()).arg("-o").arg(&plain).arg(path);
        process::run_ok(&mut age, PATIENCE);
        plain
    }

    fn manifest(&self, id: BackupId) -> Manifest {
        let bytes = fs::read(self.directory(id).join("backup_manifest")).expect("the manifest is there");
        Manifest::parse(&bytes).expect("it is PostgreSQL's")
    }
}

fn raw_of(volume: &Path) -> Vec<u8> {
    let output = process::run(Command::new("zstd").arg("-dc").arg(volume), PATIENCE);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn untar(raw: &[u8], into: &Path, scratch: &Path) {
    assert!(raw.ends_with(&[0; 1024]), "every volume has its trailer");
    fs::write(scratch, raw).expect("a test's file can be written");
    let output = process::run(Command::new("tar").arg("-xf").arg(scratch).arg("-C").arg(into), PATIENCE);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Every file of the manifest, and no other, is there with its size and checksum.
fn assert_as_listed(data: &Path, manifest: &Manifest) {
    let mut found = 0;
    let mut folders = vec![data.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a directory can be listed") {
            let path = entry.expect("a directory can be listed").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(data).expect("it is below").to_str().expect("it is text");
            let listed = manifest.files.find(name.as_bytes()).unwrap_or_else(|| panic!("{name} is not listed"));
            let listed = manifest.files.file(listed);
            let content = fs::read(&path).expect("our file can be read");
            let mut hasher = FileHasher::new(listed.checksum.algorithm());
            hasher.update(&content);
            assert_eq!((content.len() as u64, hasher.finish()), (listed.size, listed.checksum), "{name}");
            found += 1;
        }
    }
    assert_eq!(found, manifest.files.len());
}

/// PostgreSQL's own opinion, without the WAL, which is elsewhere.
fn pg_verifybackup(major: u32, data: &Path, manifest: &Path) {
    let Some(installation) = Installation::that_verifies(major) else {
        println!("skipped: no pg_verifybackup here reads a manifest of {major}");
        return;
    };
    process::give_to_service_user(data);
    let copy = data.with_extension("manifest");
    fs::copy(manifest, &copy).expect("our file can be copied");
    process::give_to_service_user(&copy);
    let mut verify = installation.command("pg_verifybackup");
    verify.arg("-n").arg("-m").arg(&copy).arg(data);
    process::run_ok(&mut verify, PATIENCE);
}

/// A data directory that starts: with the WAL of its source, and its tablespaces where they are now.
fn make_startable(server: &Server, data: &Path, file: &BackupFile) {
    for entry in fs::read_dir(server.wal_dir()).expect("WAL can be listed") {
        let path = entry.expect("WAL can be listed").path();
        // Not what is about to become a segment.
        if path.is_file() && path.file_name().is_some_and(|name| name.len() == 24) {
            fs::copy(&path, data.join("pg_wal").join(path.file_name().expect("a file has a name")))
                .expect("it is copied");
        }
    }
    let mut map = String::new();
    for space in &file.tablespaces {
        let place = data.join(format!("pg_tblspc/{}", space.oid));
        let moved = data.with_file_name(format!("{}-{}", file.id, space.oid));
        fs::rename(&place, &moved).expect("our directory can be renamed");
        process::give_to_service_user(&moved);
        map.push_str(&format!("{} {}\n", space.oid, moved.display()));
    }
    fs::write(data.join("tablespace_map"), map).expect("a test's file can be written");
}

fn tablespace(server: &Server, name: &str) -> PathBuf {
    let place = server.socket_dir().join(name);
    fs::create_dir(&place).expect("our directory can be made");
    process::give_to_service_user(&place);
    server.sql(&format!("create tablespace {name} location '{}'", place.display()));
    place
}

// --- Whole ones --------------------------------------------------------------------------------------------------

on_every_major!(a_backup_under_load_is_read_with_tar_and_starts);
fn a_backup_under_load_is_read_with_tar_and_starts(major: u32) {
    let server = Server::builder(major).checksums().setting("wal_keep_size", "2GB").start();
    let places = [tablespace(&server, "filled"), tablespace(&server, "empty")];
    server.pgbench_init(3);
    server.sql("create table kept (i int primary key, content text) tablespace filled");
    server.sql("insert into kept select i, md5(i::text) from generate_series(1, 50000) i");
    server.sql("create unlogged table forgotten (i int)");
    server.sql("insert into forgotten values (1)");
    const SUM: &str = "select md5(string_agg(content, '' order by i)) from kept";
    let sum = server.value(SUM);
    let load = server.pgbench_background(2, 60);

    let mut taking = Taking::of(&server);
    taking.options.label = Some("before the 'ä' upgrade".to_owned());
    let content = bytes::Bytes::from_static(b"include_dir 'conf.d'\n");
    taking.config.push(ConfigFile { name: "conf.d/a.conf".into(), path: "/etc/a.conf".into(), bytes: content });
    let file = taking.complete();
    server.switch_wal();
    drop(load);

    let known: Vec<&str> = file.tablespaces.iter().map(|space| space.location.as_str()).collect();
    assert_eq!(known, places.map(|place| place.display().to_string()));
    assert!(file.start_lsn < file.stop_lsn && !file.from_standby && file.data_checksums == Some(true));
    assert_eq!(file.label.as_deref(), Some("before the 'ä' upgrade"));
    assert!(file.server_version.starts_with(&format!("{major}.")), "{}", file.server_version);
    let base = file.volumes.iter().filter(|volume| volume.tablespace.is_none()).count();
    assert!(base > 3, "{base} volumes of at most 8 MiB");
    let streams: Vec<Option<u32>> = file.volumes.iter().map(|volume| volume.tablespace).collect();
    assert!(streams.windows(2).all(|pair| pair[0].is_some() || pair[1].is_none()), "PGDATA is last: {streams:?}");
    for volume in &file.volumes {
        let largest = volume.raw_bytes <= 8 << 20 || volume.manifest_files == 1;
        assert!(largest, "{volume:?}");
    }
    let config = fs::read(taking.directory(file.id).join("config/conf.d/a.conf")).expect("it is stored");
    assert_eq!(config, b"include_dir 'conf.d'\n");

    let manifest = taking.manifest(file.id);
    assert_eq!(manifest.files.len() as u64, file.manifest.files);
    assert_eq!(file.volumes.iter().map(|volume| volume.manifest_files).sum::<u64>(), file.manifest.files);
    let data = taking.extract(&file);
    assert_as_listed(&data, &manifest);
    pg_verifybackup(major, &data, &taking.directory(file.id).join("backup_manifest"));

    make_startable(&server, &data, &file);
    drop(server);
    let copy = Server::builder(major).on_copy_of(&data).start();
    assert_eq!(copy.value(SUM), sum);
    assert_eq!(copy.value("select count(*) from forgotten"), "0");
    assert_eq!(copy.value("select count(*) from pgbench_branches"), "3");
}

/// Without them the server keeps to itself what we do not need; with them every file has a longer one.
#[test]
fn every_kind_of_manifest_checksum_is_verified() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    let mut taking = Taking::of(&server);
    for algorithm in ChecksumAlgorithm::ALL {
        taking.options.checksums = algorithm;
        let file = taking.complete();
        assert_eq!((file.manifest.checksums.as_str(), file.data_checksums), (algorithm.name(), Some(false)));
        let manifest = taking.manifest(file.id);
        assert!(manifest.files.iter().all(|file| file.checksum.algorithm() == algorithm));
        assert_as_listed(&taking.extract(&file), &manifest);
    }
}

/// Each method in some version whose build has it.
#[test]
fn what_the_server_compresses_is_stored_like_the_rest() {
    for method in CompressionMethod::ALL {
        let mut tried = 0;
        for major in available_majors().into_iter().filter(|&major| major >= 15).rev() {
            let server = Server::builder(major).start();
            server.pgbench_init(2);
            let mut taking = Taking::of(&server);
            taking.options.compression = Some(ServerCompression { method, level: Some(1) });
            let report = taking.take();
            let outcome = report.outcomes.into_iter().next().expect("there is a repository");
            match outcome.result {
                Ok(file) => {
                    assert_as_listed(&taking.extract(&file), &taking.manifest(file.id));
                    tried += 1;
                    break;
                }
                // The build has it not.
                Err(BackupError::Source(error)) if error.sqlstate() == Some("42601") => {}
                Err(error) => panic!("{method} from {major}: {error}"),
            }
        }
        println!("{method}: {}", if tried > 0 { "taken" } else { "skipped: no server here can" });
    }
}

#[test]
fn an_encrypted_backup_is_read_with_age_and_its_manifest_without() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    server.pgbench_init(1);
    let mut taking = Taking::of(&server);
    taking.encrypt();
    let secret = bytes::Bytes::from_static(b"# secret\n");
    taking.config.push(ConfigFile { name: "pg_hba.conf".into(), path: "/etc/pg_hba.conf".into(), bytes: secret });
    let file = taking.complete();
    assert!(file.volumes.iter().all(|volume| volume.form == Form::Encrypted));
    let entry = &file.config[0];
    assert_eq!((entry.form, entry.raw_bytes, entry.raw_crc32.0), (Form::Encrypted, 9, crc32fast::hash(b"# secret\n")));
    let config = taking.directory(file.id).join("config/pg_hba.conf.age");
    assert_eq!(fs::read(taking.decrypt(&config)).expect("it was decrypted"), b"# secret\n");
    assert_as_listed(&taking.extract(&file), &taking.manifest(file.id));
}

// PostgreSQL waits for its own archiver, which may fail for ever, unless it is told not to.
on_every_major!(a_failing_archive_command_does_not_hold_a_backup_up);
fn a_failing_archive_command_does_not_hold_a_backup_up(major: u32) {
    let server = Server::builder(major).setting("archive_mode", "on").setting("archive_command", "false").start();
    Taking::of(&server).complete();
}

on_every_major!(a_backup_of_a_standby_says_so);
fn a_backup_of_a_standby_says_so(major: u32) {
    let primary = Server::builder(major).start();
    primary.pgbench_init(1);
    let standby = Server::standby_of(&primary).start();
    standby.wait_replayed(primary.flush_lsn());
    let taking = Taking::of(&standby);
    let file = taking.complete();
    assert!(file.from_standby);
    assert_as_listed(&taking.extract(&file), &taking.manifest(file.id));
}

/// Many small files, one large one, and volumes smaller than either.
#[test]
fn volumes_end_between_files() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    server.pgbench_init(1);
    let mut taking = Taking::of(&server);
    taking.options.volume_bytes = 100_000;
    let file = taking.complete();
    assert!(file.volumes.len() > 50);
    let numbers: Vec<u32> = file.volumes.iter().map(|volume| volume.number).collect();
    assert_eq!(numbers, (1..=file.volumes.len() as u32).collect::<Vec<_>>());
    let is_larger_than_one_frame = |volume: &VolumeEntry| volume.raw_bytes > 4 << 20;
    assert!(file.volumes.iter().any(is_larger_than_one_frame), "pgbench_accounts is a volume of its own");
    let last = raw_of(&taking.path_of(file.id, file.volumes.last().expect("there are some")));
    assert!(last[512..].len() > 8192 && last.windows(17).any(|name| name == b"global/pg_control"), "it is last of all");
    assert_as_listed(&taking.extract(&file), &taking.manifest(file.id));
}

#[test]
fn a_backup_goes_to_an_s3_store_too() {
    if !s3_conformance::in_child(&[]) {
        return;
    }
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    server.pgbench_init(2);
    let store = S3Server::start();
    let mut taking = Taking::of(&server);
    taking.options.volume_bytes = 24 << 20;
    let backend = S3Backend::open(s3_conformance::options(&store));
    taking.repositories.push(("offsite".to_owned(), Arc::new(backend)));
    let file = taking.complete();
    assert!(store.unfinished().is_empty());
    // Made once for both: the same objects, byte for byte.
    let objects = store.objects();
    for volume in &file.volumes {
        let key = taking.lineage().volume(file.id, volume.name(), volume.form);
        let stored = &objects[&format!("p/q/{key}")];
        assert_eq!(stored.body[..], fs::read(taking.path_of(file.id, volume)).expect("it is there"));
    }
    let record = run(taking.archive(1).backup_record(file.id)).expect("it can be read");
    let theirs = record.complete().expect("it is complete there too");
    assert_eq!((&theirs.volumes, &theirs.manifest), (&file.volumes, &file.manifest));
}

// --- Failed ones -------------------------------------------------------------------------------------------------

fn damage_a_page(server: &Server, table: &str) -> String {
    server.sql("checkpoint");
    let path = server.value(&format!("select pg_relation_filepath('{table}')"));
    let file =
        fs::OpenOptions::new().write(true).open(server.data_dir().join(&path)).expect("the table's file is there");
    file.write_all_at(b"damage", 8192 + 4000).expect("it can be written");
    path
}

// The server says it last of all, after the row with the stop LSN.
on_every_major!(damaged_pages_fail_a_backup_that_looked_well);
fn damaged_pages_fail_a_backup_that_looked_well(major: u32) {
    let server = Server::builder(major).checksums().start();
    server.pgbench_init(1);
    let path = damage_a_page(&server, "pgbench_accounts");
    let error = Taking::of(&server).failure();
    assert!(matches!(error, BackupError::DamagedPages { .. }), "{error}");
    assert!(error.to_string().contains(&path), "{error} names {path}");
    assert_eq!(error.exit_code(), ExitCode::Data);
}

/// As far as the server has sent so many bytes of it, slowly.
async fn until_copying(progress: &mut watch::Receiver<BackupProgress>) {
    let flows = |progress: &BackupProgress| progress.phase == BackupPhase::Copying && progress.raw_bytes > 0;
    tokio::time::timeout(PATIENCE, progress.wait_for(flows)).await.expect("in time").expect("the backup runs");
}

on_every_major!(a_source_that_dies_leaves_no_backup);
fn a_source_that_dies_leaves_no_backup(major: u32) {
    let server = Server::builder(major).start();
    server.pgbench_init(3);
    let mut taking = Taking::of(&server);
    taking.options.max_rate_kib = Some(256); // it never gets to the end
    // Without its checkpointer a postmaster ends every session, at once.
    let pid = server.value("select pid from pg_stat_activity where backend_type = 'checkpointer'");
    let pid = pid.parse().ok().and_then(Pid::from_raw).expect("a process id");
    let report = run(async {
        let (progress, mut watched) = watch::channel(BackupProgress::default());
        let stop = CancellationToken::new();
        let taken = taking.take_with(&Ready, &progress, &stop);
        let killed = async {
            until_copying(&mut watched).await;
            kill_process(pid, Signal::KILL).expect("it is there");
        };
        tokio::join!(taken, killed).0
    });
    let id = report.id.expect("it had begun");
    taking.assert_not_there(id);
    assert_eq!(unfinished(&taking.directory(id)), Vec::<PathBuf>::new());
    let error = report.outcomes.into_iter().next().expect("one").result.expect_err("it has failed");
    assert!(matches!(error, BackupError::Source(_)), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Unavailable);
}

/// Files of a local repository that have no name yet.
fn unfinished(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("a directory can be listed").path();
            let name = path.file_name().expect("it has a name").to_string_lossy().into_owned();
            match path.is_dir() {
                true => folders.push(path),
                false if name.starts_with('.') || name.contains(".tmp") => found.push(path),
                false => {}
            }
        }
    }
    found
}

#[test]
fn a_stopped_backup_ends_soon_and_does_not_exist() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    server.pgbench_init(3);
    let mut taking = Taking::of(&server);
    taking.options.max_rate_kib = Some(64); // by itself it would take a quarter of an hour
    let report = run(async {
        let (progress, mut watched) = watch::channel(BackupProgress::default());
        let stop = CancellationToken::new();
        let taken = taking.take_with(&Ready, &progress, &stop);
        let stopping = async {
            until_copying(&mut watched).await;
            stop.cancel();
        };
        tokio::time::timeout(PATIENCE, async { tokio::join!(taken, stopping).0 }).await.expect("soon")
    });
    let id = report.id.expect("it had begun");
    taking.assert_not_there(id);
    assert!(matches!(report.outcomes[0].result, Err(BackupError::Stopped)));
    assert_eq!(unfinished(&taking.directory(id)), Vec::<PathBuf>::new());
}

on_every_major!(a_standby_promoted_meanwhile_fails_the_backup);
fn a_standby_promoted_meanwhile_fails_the_backup(major: u32) {
    let primary = Server::builder(major).start();
    let mut standby = Server::standby_of(&primary).start();
    standby.wait_replayed(primary.flush_lsn());
    let conninfo = standby.conninfo();
    let promote = move || {
        let mut psql = Installation::newest_with("psql").command("psql");
        psql.args(["-XAtq", "-d", &conninfo, "-c", "select pg_promote(true, 300)"]);
        process::run_ok(&mut psql, PATIENCE);
    };
    let report = {
        let mut taking = Taking::of(&standby);
        // A new cluster has some 20 MiB in files of less than one: it takes minutes to send them all, and before each
        // one the server looks whether it has been promoted.
        taking.options.max_rate_kib = Some(192);
        run(async {
            let (progress, mut watched) = watch::channel(BackupProgress::default());
            let stop = CancellationToken::new();
            let taken = taking.take_with(&Ready, &progress, &stop);
            let promoted = async {
                until_copying(&mut watched).await;
                tokio::task::spawn_blocking(promote).await.expect("it is promoted");
            };
            let report = tokio::join!(taken, promoted).0;
            let record =
                taking.archive(0).backup_record(report.id.expect("it had begun")).await.expect("it can be read");
            assert_eq!(record.complete(), None);
            report
        })
    };
    let error = report.outcomes.into_iter().next().expect("one").result.expect_err("it has failed");
    assert!(matches!(error, BackupError::Promoted), "{error}");
    assert_eq!(error.exit_code(), ExitCode::TryAgain);
    standby.stop(Stop::Fast);
}

#[test]
fn a_repository_that_fails_drops_out_and_the_others_go_on() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    server.pgbench_init(2);
    let mut taking = Taking::of(&server);
    // One that has no room for an object, and one that finds out when it is to give it its name.
    let roots = ["two", "three"].map(|name| taking.add_directory(name));
    for (index, room) in [(1, 1 << 20), (2, usize::MAX)] {
        taking.repositories[index].1 = Arc::new(Full(LocalBackend::open(roots[index - 1].clone()), room));
    }
    let report = taking.take();
    assert!(report.is_complete_somewhere() && !report.is_complete());
    let file = report.outcomes[0].result.as_ref().expect("the first is whole");
    assert_as_listed(&taking.extract(file), &taking.manifest(file.id));
    for index in [1, 2] {
        let error = report.outcomes[index].result.as_ref().expect_err("it is full");
        assert!(matches!(error, BackupError::Store(error) if error.is(StoreErrorKind::NoSpace)), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Unavailable);
        let record = run(taking.archive(index).backup_record(file.id)).expect("it can be read");
        assert!(record.begin.is_some() && record.backup.is_none());
        assert_eq!(unfinished(&roots[index - 1]), Vec::<PathBuf>::new());
    }

    // All of them full: there is none, and it ends although the server has more to send.
    taking.repositories.remove(0);
    let error = taking.failure();
    assert!(matches!(error, BackupError::Store(_)), "{error}");
}

/// A disk that is full after so many bytes of an object, or before it has its name: real ones are hard to fill in a test.
#[derive(Debug)]
struct Full(LocalBackend, usize);

#[derive(Debug)]
struct FullUpload(Box<dyn Upload>, usize);

fn no_space() -> StoreError {
    StoreError::new(StoreErrorKind::NoSpace, "store", "a full disk", "no space left on device")
}

#[async_trait]
impl Backend for Full {
    fn describe(&self) -> String {
        self.0.describe()
    }

    async fn put_new_with(&self, key: &Key, body: &[bytes::Bytes], facts: &Facts) -> Result<(), StoreError> {
        self.0.put_new_with(key, body, facts).await
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(FullUpload(self.0.begin_upload(key).await?, self.1)))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        self.0.stat(key).await
    }

    async fn fetch(&self, key: &Key, range: std::ops::Range<u64>) -> Result<bytes::Bytes, StoreError> {
        self.0.fetch(key, range).await
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        self.0.list(directory).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.0.delete(key).await
    }
}

#[async_trait]
impl Upload for FullUpload {
    async fn append(&mut self, part: bytes::Bytes) -> Result<(), StoreError> {
        match self.1.checked_sub(part.len()) {
            Some(left) => {
                self.1 = left;
                self.0.append(part).await
            }
            None => Err(no_space()),
        }
    }

    async fn read_back(&mut self, range: std::ops::Range<u64>) -> Result<bytes::Bytes, StoreError> {
        self.0.read_back(range).await
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        Err(no_space())
    }

    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        self.0.abort().await
    }
}

/// What goes wrong when all is copied, and only the commit mark is missing.
#[derive(Debug)]
enum Late {
    /// The WAL does not arrive.
    Wal,
    Lease,
    /// Somebody who expires takes the backup for abandoned.
    Dead(Archive, BackupId),
}

#[async_trait]
impl Surroundings for Late {
    fn now(&self) -> Timestamp {
        match self {
            Late::Dead(_, id) => id.started(),
            _ => Timestamp::now(),
        }
    }

    async fn wal_is_stored(&self, repository: &str, _: NeededWal) -> Result<WalStored, Failure> {
        match self {
            Late::Wal => Err(Failure::new(ExitCode::Unavailable, format!("WAL does not arrive in {repository}"))),
            Late::Dead(archive, id) => {
                let dead = DeadFile { schema: 1, id: *id, at: Timestamp::now(), reason: "a test".into() };
                assert!(archive.put_dead(&dead).await.expect("it can be stored"));
                Ok(WalStored::default())
            }
            Late::Lease => Ok(WalStored::default()),
        }
    }

    async fn lease_holds(&self, _: &str) -> Result<(), Failure> {
        match self {
            Late::Lease => Err(Failure::new(ExitCode::TryAgain, "the lease is somebody else's")),
            _ => Ok(()),
        }
    }
}

#[test]
fn without_its_wal_or_its_lease_or_declared_dead_there_is_no_commit_mark() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    let taking = Taking::of(&server);
    let id = BackupId::new("2020-02-29T12:00:00Z".parse().expect("a time"), BackupType::Full);
    for late in [Late::Wal, Late::Lease, Late::Dead(taking.archive(0), id)] {
        let report = run(taking.take_in(&late, &CancellationToken::new()));
        let id = report.id.expect("it had begun");
        let record = run(taking.archive(0).backup_record(id)).expect("it can be read");
        assert!(record.begin.is_some() && record.backup.is_none(), "{late:?}");
        let error = report.outcomes[0].result.as_ref().expect_err("it is not complete");
        match late {
            Late::Wal => assert!(matches!(error, BackupError::Wal(_))),
            Late::Lease => assert!(matches!(error, BackupError::Lease(_))),
            Late::Dead(..) => assert!(matches!(error, BackupError::Dead { .. })),
        }
    }
}

#[test]
fn a_server_of_another_cluster_is_refused_before_anything_is_begun() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    let taking = Taking::of(&server);
    let mut request = taking.request();
    request.destinations[0].archive.lineage = Lineage::new("main", SystemId(7), 1);
    let report = run(async {
        let connection = Connection::open(&NetDialer, &login(&server)).await.expect("a walsender");
        let (progress, _) = watch::channel(BackupProgress::default());
        backup::take(connection, request, &Ready, &progress, &CancellationToken::new()).await
    });
    assert_eq!(report.id, None);
    let error = report.outcomes[0].result.as_ref().expect_err("it is refused");
    assert!(matches!(error, BackupError::OtherSystem { .. }), "{error}");
    assert_eq!(fs::read_dir(taking.scratch.join("one")).expect("it can be listed").count(), 0);
}

#[test]
fn two_that_begin_in_one_second_have_different_ids() {
    let Some(major) = newest_major() else { return };
    let server = Server::builder(major).start();
    let taking = Taking::of(&server);
    let ids = [taking.complete().id, taking.complete().id, taking.complete().id];
    assert!(ids.is_sorted() && ids[0] != ids[1] && ids[1] != ids[2]);
}
