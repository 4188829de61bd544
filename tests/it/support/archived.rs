//! Owns: an archive under test: its repository and configuration, the agents and restores that use it, and what it
//! holds, told by the library, by the `zstd` program and by the files themselves.
//! Does not own: the program's processes (`agent.rs`), servers (`postgres.rs`).

use std::fs;
use std::future::Future;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use age::secrecy::ExposeSecret;
use seawall::agent::startup;
use seawall::catalog::store::{self, Archive};
use seawall::catalog::{Catalog, Source};
use seawall::codec::Form;
use seawall::continuity::{self, Gap, GapState};
use seawall::repository::{Key, LocalBackend};
use seawall::wal::{Lsn, TimelineId};

use super::agent::{self, Agent};
use super::postgres::Server;
use super::process::{self, Scratch};

const SLOT: &str = "seawall";
/// Whoever stops an agent in good order expects it to finish, however long that takes.
const GRACE: &str = "shutdown_grace = \"5min\"\n";
/// For the archive to catch up with a server that is no longer written to.
const SETTLE_DEADLINE: Duration = process::DEADLINE;
const DECODE_DEADLINE: Duration = process::DEADLINE;

/// A repository in a directory of its own, and a configuration that names it.
#[derive(Debug)]
pub struct Archived {
    scratch: Scratch,
}

impl Archived {
    /// For one server, by its socket.
    pub fn of(server: &Server) -> Archived {
        Archived::by_conninfo(&server.conninfo())
    }

    pub fn by_conninfo(conninfo: &str) -> Archived {
        let archived = Archived { scratch: Scratch::new() };
        archived.point_at(conninfo);
        archived
    }

    /// Has later agents connect elsewhere.
    pub fn point_at(&self, conninfo: &str) {
        let text = format!(
            "[clusters.main]\npostgres = \"{conninfo}\"\nslot = \"{SLOT}\"\nrepositories = [\"local\"]\n\
             backup.automatic = false\n{GRACE}tail_interval = \"200ms\"\n\n[repositories.local]\nurl = \"file://{}\"\n",
            self.repository().display()
        );
        fs::write(self.config(), text).expect("a configuration can be written");
    }

    /// Adds lines to the cluster's table.
    pub fn configure(&self, lines: &str) {
        let text = fs::read_to_string(self.config()).expect("the configuration can be read");
        let text = if lines.contains("shutdown_grace") { text.replace(GRACE, "") } else { text };
        let text = text.replace("tail_interval", &format!("{lines}tail_interval"));
        fs::write(self.config(), text).expect("a configuration can be written");
    }

    /// A second archive with the same content, for a test that damages it.
    pub fn copy(&self) -> Archived {
        let copy = Archived { scratch: Scratch::new() };
        copy.point_at("host=127.0.0.1 user=nobody");
        process::run_ok(Command::new("cp").arg("-a").arg(self.repository()).arg(copy.repository()), SETTLE_DEADLINE);
        copy
    }

    pub fn repository(&self) -> PathBuf {
        self.scratch.join("repository")
    }

    pub fn config(&self) -> PathBuf {
        self.scratch.join("seawall.toml")
    }

    /// Behind `--config`.
    pub fn config_argument(&self) -> String {
        self.config().to_str().expect("our paths are text").to_owned()
    }

    /// A new agent, as the service user.
    pub fn agent(&self) -> Agent {
        Agent::start_as_service_user(&self.scratch, ["--config", &self.config_argument(), "run"])
    }

    /// A new agent that has begun to stream.
    pub fn streaming_agent(&self) -> Agent {
        let mut agent = self.agent();
        agent.wait_for_log("streaming", SETTLE_DEADLINE);
        agent
    }

    /// `wal-get` from this archive, with more arguments.
    pub fn restore_command(&self, arguments: &[&str]) -> String {
        let config = self.config_argument();
        let words = [&["wal-get", "%f", "%p", "--config", &config], arguments].concat();
        agent::restore_command(&self.scratch, &self.repository(), &words)
    }

    // --- What it holds ---

    /// The one lineage there is.
    pub fn archive(&self) -> Archive {
        let backend = Arc::new(LocalBackend::open(self.repository()));
        let mut lineages = block_on(store::lineages(backend.as_ref(), "main")).expect("the lineages can be listed");
        assert_eq!(lineages.len(), 1, "one server has one lineage");
        Archive::new(backend, lineages.remove(0).0)
    }

    pub fn catalog(&self) -> Catalog {
        block_on(self.archive().load_catalog()).expect("the catalog can be read")
    }

    /// The last record end of a timeline that a new agent would go on from.
    pub fn durable(&self, timeline: u32) -> Lsn {
        let archive = self.archive();
        let size = block_on(archive.lineage_file()).expect("a lineage has its file").segment_size;
        let state = block_on(archive.frontier(TimelineId(timeline), size)).expect("the frontier can be read");
        startup::frontier_of(&state, size).map_or(Lsn::ZERO, |frontier| frontier.stored().record_end)
    }

    /// Every gap that is open, by the library and by the program.
    pub fn assert_no_gaps(&self) {
        let open = |gap: &Gap| gap.state == GapState::Open;
        let gaps: Vec<Gap> = continuity::gaps(&self.catalog()).into_iter().filter(open).collect();
        assert!(gaps.is_empty(), "the archive has gaps: {gaps:#?}");
        agent::seawall_ok(["--config", &self.config_argument(), "gaps"]);
    }

    pub fn path_of(&self, key: &Key) -> PathBuf {
        self.repository().join(key.to_string())
    }

    /// Compares everything that counts with the server's own files, as far as it still has them: the number of
    /// sealed segments and of tail bytes that are equal. A difference fails.
    pub fn compare_with_wal_of(&self, server: &Server) -> Compared {
        // An agent at work replaces tails: what was listed may have gone, and what counts now is listed then.
        process::eventually(SETTLE_DEADLINE, "everything that is listed is there", || self.compare_once(server))
    }

    fn compare_once(&self, server: &Server) -> Option<Compared> {
        let catalog = self.catalog();
        let size = catalog.segment_size();
        let lineage = &catalog.lineage;
        let mut compared = Compared::default();
        for piece in catalog.timelines.keys().flat_map(|&timeline| catalog.pieces(timeline)) {
            let (name, key) = match piece.source {
                Source::Sealed(name) => {
                    let form = [Form::Plain, Form::Encrypted].into_iter();
                    let mut keys = form.map(|form| lineage.segment(name, form));
                    (name, keys.find(|key| self.path_of(key).exists()).expect("a sealed segment has its object"))
                }
                Source::Tail(tail) => {
                    let timeline = catalog.timelines.values().flatten();
                    let of_tail = timeline.flat_map(|directory| &directory.tails);
                    let mut named = of_tail.filter(|(_, tails)| tails.iter().any(|object| object.name == tail));
                    let (&name, _) = named.next().expect("a piece has its object");
                    (name, lineage.tail(name, &tail))
                }
            };
            let Ok(theirs) = fs::read(server.wal_dir().join(name.to_string())) else { continue };
            let is_tail = matches!(piece.source, Source::Tail(_));
            // Another name for the same content, which nobody takes away while it is read.
            let held =
                self.scratch.join("compared").with_extension(self.path_of(&key).extension().expect("it has one"));
            let _ = fs::remove_file(&held);
            match fs::hard_link(self.path_of(&key), &held) {
                Err(error) if is_tail && error.kind() == ErrorKind::NotFound => return None,
                linked => linked.expect("an object can be linked"),
            }
            let ours = self.decode(&held);
            compared.encrypted += usize::from(key.as_str().ends_with(".age"));
            match piece.source {
                Source::Sealed(_) => {
                    assert!(ours == theirs, "{key} differs from the server's file");
                    compared.segments += 1;
                }
                Source::Tail(tail) => {
                    let (from, to) = (size.offset_of(tail.from) as usize, (tail.to - size.floor(tail.from)) as usize);
                    assert!(ours == theirs[from..to], "{key} differs from the server's file");
                    compared.tail_bytes += ours.len();
                }
            }
        }
        Some(compared)
    }

    /// A new key, whose identity the tests read with from now on; its recipient.
    pub fn new_key(&self) -> String {
        let identity = age::x25519::Identity::generate();
        let mut file = fs::read_to_string(self.identity_file()).unwrap_or_default();
        file.push_str(&format!("# {}\n{}\n", identity.to_public(), identity.to_string().expose_secret()));
        fs::write(self.identity_file(), file).expect("a test's file can be written");
        identity.to_public().to_string()
    }

    pub fn identity_file(&self) -> PathBuf {
        self.scratch.join("identities.txt")
    }

    /// An object's content as the tools everybody has read it: age's own library, the `zstd` program.
    pub fn decode(&self, path: &Path) -> Vec<u8> {
        if path.extension().is_none_or(|extension| extension != "age") {
            return zstd_decode(path);
        }
        let file = age::IdentityFile::from_file(self.identity_file().display().to_string()).expect("an identity file");
        let plain = decrypt(path, file).unwrap_or_else(|error| panic!("age -d {}: {error}", path.display()));
        let inner = self.scratch.join("decrypted.zst");
        fs::write(&inner, plain).expect("a test's file can be written");
        zstd_decode(&inner)
    }

    // --- What the server was told ---

    /// Waits until the server knows everything it has written to be durable.
    pub fn wait_acknowledged(&self, server: &Server) {
        const ALL: &str = "select restart_lsn = case when pg_is_in_recovery() then \
             coalesce(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) else pg_current_wal_flush_lsn() end \
             from pg_replication_slots where slot_name = 'seawall' and active";
        process::eventually(SETTLE_DEADLINE, "everything is acknowledged", || {
            (server.sql(ALL) == [["t"]]).then_some(())
        });
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Compared {
    pub segments: usize,
    pub tail_bytes: usize,
    /// Objects of either kind.
    pub encrypted: usize,
}

/// Where the agent's slot stands, once nobody uses it.
pub fn released_slot(server: &Server) -> Lsn {
    let statement = "select restart_lsn from pg_replication_slots where slot_name = 'seawall' and not active";
    process::eventually(SETTLE_DEADLINE, "the slot is released", || {
        server.sql(statement).first().map(|row| row[0].parse().expect("a slot of ours holds WAL"))
    })
}

/// `age -d`.
pub fn decrypt(path: &Path, identities: age::IdentityFile<age::NoCallbacks>) -> Result<Vec<u8>, age::DecryptError> {
    let stored = fs::read(path).expect("an object can be read");
    let identities = identities.into_identities()?;
    let identities = identities.iter().map(|identity| identity.as_ref() as &dyn age::Identity);
    let mut plain = Vec::new();
    age::Decryptor::new(&stored[..])?.decrypt(identities)?.read_to_end(&mut plain)?;
    Ok(plain)
}

/// An object as the tool everybody has reads it.
pub fn zstd_decode(path: &Path) -> Vec<u8> {
    let output = process::run(Command::new("zstd").arg("-dc").arg(path), DECODE_DEADLINE);
    assert!(output.status.success(), "zstd -d {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    output.stdout
}

pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made").block_on(work)
}

// --- A table that remembers commits ------------------------------------------------------------------------------

pub fn create_journal(server: &Server) {
    server.sql("create table journal (id bigserial primary key, note text not null)");
}

/// One committed row.
pub fn note(server: &Server, note: &str) {
    server.sql(&format!("insert into journal (note) values ('{note}')"));
}

/// Every note, in order.
pub fn notes(server: &Server) -> Vec<String> {
    server.sql("select note from journal order by id").concat()
}
