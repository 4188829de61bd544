//! Owns: where each tablespace goes, and that nothing of anybody else's is there.
//! Does not own: what is in them, PGDATA itself (`ground.rs`).
//!
//! A tablespace's old place may belong to the server it came from, which may be running: it is used only where it is
//! empty. With --delta a place is used again that the data directory's own link names, if this restore has put the link
//! there or the operator names the place: a copied data directory has the links of the live one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::error::RestoreError;
use super::ground::{self, Ground};
use super::tree::{Tree, names};
use crate::catalog::backup::TablespaceEntry;
use crate::repository::durable::Directory;

/// Where one tablespace goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub oid: u32,
    /// `None`: in PGDATA itself (`allow_in_place_tablespaces`).
    pub location: Option<PathBuf>,
    /// The operator has named the place.
    pub is_said: bool,
}

/// `--tablespace OLD=NEW`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub old: PathBuf,
    pub new: PathBuf,
}

/// Decides, from what was asked for, without looking at any disk.
pub fn places(
    tablespaces: &[TablespaceEntry],
    mappings: &[Mapping],
    pgdata: &Path,
) -> Result<Vec<Place>, RestoreError> {
    let usage = |mapping: &Mapping, fault: String| RestoreError::Usage {
        option: "--tablespace",
        value: format!("{}={}", mapping.old.display(), mapping.new.display()),
        fault,
    };
    let known = || {
        let shown = tablespaces.iter().map(|tablespace| tablespace.location.clone());
        match tablespaces.is_empty() {
            true => "the backup has no tablespaces".to_string(),
            false => format!("the backup's tablespaces are at {}", shown.collect::<Vec<_>>().join(", ")),
        }
    };
    for (index, mapping) in mappings.iter().enumerate() {
        if !tablespaces.iter().any(|tablespace| same(&tablespace.location, &mapping.old)) {
            return Err(usage(mapping, known()));
        }
        if mappings[..index].iter().any(|earlier| earlier.old == mapping.old) {
            return Err(usage(mapping, "this tablespace is mapped twice".to_string()));
        }
        if !is_sound(&mapping.new) {
            return Err(usage(mapping, "the new place must be an absolute path, without `..`".to_string()));
        }
    }
    let mut places: Vec<Place> = Vec::new();
    for TablespaceEntry { oid, location } in tablespaces {
        let mapped = mappings.iter().find(|mapping| same(location, &mapping.old)).map(|mapping| mapping.new.clone());
        let is_said = mapped.is_some();
        let in_place = mapped.is_none() && *location == format!("pg_tblspc/{oid}");
        let location = (!in_place).then(|| mapped.unwrap_or_else(|| PathBuf::from(location)));
        if let Some(location) = &location {
            check(*oid, location, pgdata, &places)?;
        }
        if places.iter().any(|place| place.oid == *oid) {
            return Err(RestoreError::Inconsistent { fault: format!("it has tablespace {oid} twice") });
        }
        places.push(Place { oid: *oid, location, is_said });
    }
    Ok(places)
}

fn same(location: &str, path: &Path) -> bool {
    Path::new(location) == path
}

/// Absolute, of plain parts, and such that the server can read it back from a line.
fn is_sound(location: &Path) -> bool {
    let bytes = location.as_os_str().as_bytes();
    let plain = |part: std::path::Component<'_>| !matches!(part, std::path::Component::ParentDir);
    location.is_absolute() && location.components().all(plain) && !bytes.contains(&0) && !bytes.contains(&b'\n')
}

fn check(oid: u32, location: &Path, pgdata: &Path, others: &[Place]) -> Result<(), RestoreError> {
    let fault =
        |fault: &str| Err(RestoreError::Tablespace { oid, location: location.to_path_buf(), fault: fault.to_string() });
    if !is_sound(location) {
        return fault("is not an absolute path without `..`");
    }
    if location == Path::new("/") || pgdata.starts_with(location) {
        return fault("holds the data directory");
    }
    if location.starts_with(pgdata) {
        return fault("lies in the data directory");
    }
    let overlaps = |other: &Path| other.starts_with(location) || location.starts_with(other);
    match others.iter().filter_map(|other| other.location.as_deref()).any(overlaps) {
        true => fault("is the place of another tablespace, or lies in it"),
        false => Ok(()),
    }
}

/// Looks at every place outside PGDATA and opens it; an absent one is made. Refuses one that holds anything of somebody else's.
pub fn take(
    places: &[Place],
    ground: &Ground,
    unfinished: &[TablespaceEntry],
) -> Result<BTreeMap<u32, Tree>, RestoreError> {
    let owner = ground.tree.owner();
    let mut trees = BTreeMap::new();
    for place in places {
        let Some(location) = &place.location else { continue };
        let root = ground::open_or_create(location, owner)?;
        let real = std::fs::canonicalize(location).map_err(|error| RestoreError::local("open", location, error))?;
        check_real(place.oid, location, &real, ground, &trees)?;
        let was_ours = |known: &TablespaceEntry| known.oid == place.oid && same(&known.location, location);
        let is_ours = place.is_said || unfinished.iter().any(was_ours);
        if !is_ours || !is_linked(&ground.tree, place.oid, location) {
            refuse_used(place.oid, location, &root)?;
        }
        trees.insert(place.oid, Tree::new(root, location.clone(), owner));
    }
    Ok(trees)
}

/// Opens the places in PGDATA itself, which are made. Only once the restore has begun.
pub fn take_inside(places: &[Place], ground: &Ground, trees: &mut BTreeMap<u32, Tree>) -> Result<(), RestoreError> {
    for place in places.iter().filter(|place| place.location.is_none()) {
        trees.insert(place.oid, in_place(ground, place.oid)?);
    }
    Ok(())
}

fn in_place(ground: &Ground, oid: u32) -> Result<Tree, RestoreError> {
    let path = format!("pg_tblspc/{oid}");
    ground.tree.directory(path.as_bytes(), None)?;
    let shown = ground.tree.path().join(&path);
    let open = || ground.tree.root().open_child("pg_tblspc")?.open_child(oid.to_string());
    let root = open().map_err(|error| RestoreError::local("open", &shown, error))?;
    Ok(Tree::new(root, shown, ground.tree.owner()))
}

/// Links in the paths may lead two of them to one place.
fn check_real(
    oid: u32,
    location: &Path,
    real: &Path,
    ground: &Ground,
    others: &BTreeMap<u32, Tree>,
) -> Result<(), RestoreError> {
    let canonical = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let pgdata = canonical(ground.tree.path());
    let overlaps = |other: &Path| other.starts_with(real) || real.starts_with(other);
    let taken = overlaps(&pgdata)
        || others
            .values()
            .map(|tree| canonical(tree.path()))
            .any(|other| overlaps(&other) && !other.starts_with(&pgdata));
    match taken {
        true => {
            let fault = format!("leads to {}, where something else of this restore goes", real.display());
            Err(RestoreError::Tablespace { oid, location: location.to_path_buf(), fault })
        }
        false => Ok(()),
    }
}

/// Whether the data directory that is restored again has this tablespace there already.
fn is_linked(pgdata: &Tree, oid: u32, location: &Path) -> bool {
    let links = pgdata.root().open_child("pg_tblspc");
    links.and_then(|links| links.read_link(oid.to_string())).is_ok_and(|target| target == location)
}

fn refuse_used(oid: u32, location: &Path, root: &Directory) -> Result<(), RestoreError> {
    let mut names = names(root).map_err(|error| RestoreError::local("list", location, error))?;
    // Of a volume that was mounted for it.
    names.retain(|name| name != b"lost+found");
    let Some(first) = names.first() else { return Ok(()) };
    let version = names.iter().find(|name| name.starts_with(b"PG_"));
    let fault = match version {
        Some(version) => format!(
            "a server uses, or has used: it holds {}",
            OsStr::from_bytes(version).to_string_lossy().escape_debug()
        ),
        None => format!("is not empty: it holds {}", OsStr::from_bytes(first).to_string_lossy().escape_debug()),
    };
    Err(RestoreError::Tablespace { oid, location: location.to_path_buf(), fault })
}

/// Makes the links of pg_tblspc, and removes those of tablespaces the backup does not have.
pub fn link(places: &[Place], pgdata: &Tree) -> Result<(), RestoreError> {
    let links = pgdata.directory(b"pg_tblspc", None)?;
    let local = |source: io::Error| RestoreError::local("list", pgdata.path().join("pg_tblspc"), source);
    for name in names(&links).map_err(local)? {
        let is_ours = |place: &Place| place.oid.to_string().as_bytes() == name;
        let place = places.iter().find(|place| is_ours(place));
        let path = [b"pg_tblspc/", name.as_slice()].concat();
        match place {
            Some(Place { location: None, .. }) => {}
            Some(Place { oid, location: Some(location), .. }) if is_linked(pgdata, *oid, location) => {}
            _ => pgdata.remove(&path)?,
        }
    }
    for place in places {
        let Some(location) = &place.location else { continue };
        if !is_linked(pgdata, place.oid, location) {
            pgdata.link(format!("pg_tblspc/{}", place.oid).as_bytes(), location)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::SystemId;

    fn entries(locations: &[&str]) -> Vec<TablespaceEntry> {
        let entry = |(index, location): (usize, &&str)| TablespaceEntry {
            oid: 16384 + index as u32,
            location: location.to_string(),
        };
        locations.iter().enumerate().map(entry).collect()
    }

    fn mapping(old: &str, new: &str) -> Mapping {
        Mapping { old: old.into(), new: new.into() }
    }

    fn decided(locations: &[&str], mappings: &[Mapping]) -> Result<Vec<Option<PathBuf>>, String> {
        let places = places(&entries(locations), mappings, Path::new("/data/copy"));
        let location = |place: Place| place.location;
        places.map(|places| places.into_iter().map(location).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_goes_where_it_was_or_where_it_is_sent() {
        let found = decided(&["/fast", "/slow", "pg_tblspc/16386"], &[mapping("/slow", "/new")]).unwrap();
        assert_eq!(found, [Some("/fast".into()), Some("/new".into()), None]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |locations: &[&str], mappings: &[Mapping]| decided(locations, mappings).unwrap_err();
        assert!(refused(&["/fast"], &[mapping("/fats", "/new")]).contains("tablespaces are at /fast"));
        assert!(refused(&[], &[mapping("/fast", "/new")]).contains("no tablespaces"));
        assert!(refused(&["/fast"], &[mapping("/fast", "new")]).contains("absolute"));
        assert!(refused(&["/fast"], &[mapping("/fast", "/x/../etc")]).contains("absolute"));
        assert!(refused(&["/fast"], &[mapping("/fast", "/a"), mapping("/fast", "/b")]).contains("twice"));
        for location in ["/data/copy", "/data/copy/ts", "/data", "/", "ts", "/a/../b", "/a\nb"] {
            refused(&[location], &[]);
        }
        for pair in [["/a", "/a"], ["/a", "/a/b"], ["/a/b", "/a"]] {
            assert!(refused(&pair, &[]).contains("another tablespace"));
        }
    }

    fn ground(pgdata: &Path, delta: bool) -> Ground {
        let owner = Some((rustix::process::geteuid(), rustix::process::getegid()));
        ground::take(pgdata, owner, SystemId(7), delta).unwrap()
    }

    #[test]
    fn a_place_in_use_is_refused_and_the_copys_own_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let [pgdata, location] = ["pgdata", "ts"].map(|name| scratch.path().join(name));
        let said = |oid| Place { oid, location: Some(location.clone()), is_said: true };
        let place = [said(16384)];
        let ground = ground(&pgdata, false);
        take(&place, &ground, &[]).unwrap();
        std::fs::create_dir(location.join("lost+found")).unwrap();
        take(&place, &ground, &[]).unwrap();
        std::fs::create_dir(location.join("PG_18_202506291")).unwrap();
        let error = take(&place, &ground, &[]).unwrap_err();
        assert!(error.to_string().contains("a server uses"), "{error}");
        link(&place, &ground.tree).unwrap();
        take(&place, &ground, &[]).unwrap();
        let unsaid = [Place { is_said: false, ..said(16384) }];
        take(&unsaid, &ground, &[]).unwrap_err();
        let known = TablespaceEntry { oid: 16384, location: location.to_str().unwrap().into() };
        take(&unsaid, &ground, &[known]).unwrap();
        let other = [said(16385)];
        take(&other, &ground, &[]).unwrap_err();
        link(&other, &ground.tree).unwrap();
        assert!(!pgdata.join("pg_tblspc/16384").is_symlink() && pgdata.join("pg_tblspc/16385").is_symlink());
    }

    #[test]
    fn a_link_does_not_lead_two_to_one_place() {
        let scratch = tempfile::tempdir().unwrap();
        let pgdata = scratch.path().join("pgdata");
        let ground = ground(&pgdata, false);
        let sly = scratch.path().join("sly");
        std::os::unix::fs::symlink(&pgdata, &sly).unwrap();
        let place = [Place { oid: 16384, location: Some(sly), is_said: true }];
        let error = take(&place, &ground, &[]).unwrap_err();
        assert!(error.to_string().contains("leads to"), "{error}");
    }
}
