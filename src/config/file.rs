//! Owns: what was typed, in the file, in variables and on the command line, layered into one tree of known keys.
//! Does not own: what the values mean (`mod.rs`).
//!
//! Tables are walked by hand, not through serde: every value keeps its place, and an unknown key is named with its
//! line and its nearest neighbour.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Source};
use super::reference::{Group, LATER_TABLES, nearest};
use crate::postgres::Environment;

const VARIABLE_PREFIX: &str = "SEAWALL__";
const NAME_BYTES_MAX: usize = 40;
/// Two ways to say the same: a later layer that uses one replaces the other.
const ALTERNATIVES: [&str; 2] = ["postgres", "postgres_file"];
/// Keys whose value is a list.
const LISTS: [&str; 2] = ["repositories", "encrypt_to"];

/// A value as typed. Not `Debug`: it may be a connection string with a password.
#[derive(Clone)]
pub(super) enum Value {
    Text(String),
    List(Vec<String>),
    Flag(bool),
    Integer(i64),
    /// A type no key has: its TOML name, for the error.
    Other(&'static str),
}

impl Value {
    /// What it is, for the error that says what it should be.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Flag(_) => "true or false",
            Value::Integer(_) => "a number",
            Value::Other(kind) => kind,
        }
    }
}

#[derive(Clone)]
pub(super) struct Typed {
    pub value: Value,
    pub source: Source,
}

pub(super) type Table = BTreeMap<&'static str, Typed>;

/// All tables, by group and name; the name is empty where a group is one table. An entry of a table within a table has
/// a key of several words: `storage_class.wal`, `retention.gfs.daily`.
#[derive(Clone, Default)]
pub(super) struct Tree(BTreeMap<Group, BTreeMap<String, Table>>);

impl Tree {
    pub fn tables(&self, group: Group) -> impl Iterator<Item = (&String, &Table)> {
        self.0.get(&group).into_iter().flatten()
    }

    pub fn table(&self, group: Group, name: &str) -> Option<&Table> {
        self.0.get(&group)?.get(name)
    }

    pub fn names(&self, group: Group) -> Vec<String> {
        self.tables(group).map(|(name, _)| name.clone()).collect()
    }

    /// Layers are applied in order, so that what comes last wins.
    pub fn set(&mut self, group: Group, name: &str, key: &'static str, typed: Typed) {
        let table = self.declare(group, name);
        if ALTERNATIVES.contains(&key) {
            let same_layer =
                |other: &Typed| std::mem::discriminant(&other.source) == std::mem::discriminant(&typed.source);
            table.retain(|other, value| !ALTERNATIVES.contains(other) || same_layer(value));
        }
        table.insert(key, typed);
    }

    fn declare(&mut self, group: Group, name: &str) -> &mut Table {
        self.0.entry(group).or_default().entry(name.to_string()).or_default()
    }

    /// A cluster that only `--cluster` names.
    pub fn declare_flagged(&mut self, name: &str) -> Result<(), ConfigError> {
        check_name(Group::Clusters, name, &Source::Flag("--cluster"))?;
        self.declare(Group::Clusters, name);
        Ok(())
    }

    /// The lowest layer: a TOML document.
    pub fn add_file(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let file = File { text, path };
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            source_place: file.place(error.span().map_or(0, |span| span.start)),
            // Without toml's excerpt of the line, which may hold a password.
            problem: error.message().to_string(),
        })?;
        for (key, value) in document.get_ref() {
            let place = file.place(key.span().start);
            let Some(group) = Group::ALL.into_iter().find(|group| group.name() == key.get_ref().as_ref()) else {
                return Err(unknown_table(key.get_ref(), place));
            };
            self.add_group(group, value.get_ref(), place, &file)?;
        }
        Ok(())
    }

    fn add_group(&mut self, group: Group, value: &DeValue<'_>, place: Source, file: &File) -> Result<(), ConfigError> {
        let tables = value.as_table().ok_or_else(|| not_a_table(group.name(), group, place))?;
        if !group.is_named() {
            return self.add_table(group, "", tables, file);
        }
        for (name, value) in tables {
            let place = file.place(name.span().start);
            let name = name.get_ref();
            check_name(group, name, &place)?;
            let full = format!("{}.{name}", group.name());
            let table = value.get_ref().as_table().ok_or_else(|| not_a_table(&full, group, place))?;
            self.add_table(group, name, table, file)?;
        }
        Ok(())
    }

    fn add_table(&mut self, group: Group, name: &str, table: &DeTable<'_>, file: &File) -> Result<(), ConfigError> {
        self.declare(group, name);
        self.add_entries(group, name, "", table, file)
    }

    /// Of a table, or of one within it, whose path `prefix` is, with a dot at its end.
    fn add_entries(
        &mut self,
        group: Group,
        name: &str,
        prefix: &str,
        table: &DeTable<'_>,
        file: &File,
    ) -> Result<(), ConfigError> {
        for (key, value) in table {
            let source = file.place(key.span().start);
            let key = format!("{prefix}{}", key.get_ref());
            if !group.has_subtable(&key) {
                let key = known_key(group, name, &key, &source)?;
                self.set(group, name, key, Typed { value: typed(value.get_ref()), source });
                continue;
            }
            let Some(entries) = value.get_ref().as_table() else {
                let expected = format!("a table, such as {{ {} }}", group.subtable_example(&key));
                let key = group.path(name, &key);
                return Err(ConfigError::Invalid { source_place: source, key, value: None, expected });
            };
            self.add_entries(group, name, &format!("{key}."), entries, file)?;
        }
        Ok(())
    }

    /// `SEAWALL__CLUSTERS__MAIN__SLOT=…`; lists are comma-separated.
    pub fn add_variables(&mut self, environment: &dyn Environment) -> Result<(), ConfigError> {
        for (variable, text) in environment.vars(VARIABLE_PREFIX) {
            let source = Source::Variable(variable.clone());
            let (group, name, key) = variable_path(&variable, &source)?;
            if group.is_named() {
                check_name(group, &name, &source)?;
            }
            let key = known_key(group, &name, &key, &source)?;
            let value = match LISTS.contains(&key) {
                true => Value::List(text.split(',').map(|name| name.trim().to_string()).collect()),
                false => Value::Text(text),
            };
            self.set(group, &name, key, Typed { value, source });
        }
        Ok(())
    }
}

struct File<'a> {
    text: &'a str,
    path: &'a Path,
}

impl File<'_> {
    fn place(&self, offset: usize) -> Source {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Source::File { path: self.path.to_path_buf(), line }
    }
}

fn typed(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Array(values) => {
            let texts: Option<Vec<String>> =
                values.iter().map(|value| value.get_ref().as_str().map(str::to_string)).collect();
            texts.map_or(Value::Other("a list of other things"), Value::List)
        }
        DeValue::Boolean(flag) => Value::Flag(*flag),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(integer) => Value::Integer(integer),
            Err(_) => Value::Other("a number as large as that"),
        },
        DeValue::Float(_) => Value::Other("a number with a fraction"),
        DeValue::Datetime(_) => Value::Other("a time"),
        DeValue::Table(_) => Value::Other("a table"),
    }
}

/// Names hold no `__`, keys neither begin nor end with `_`: the group stands before the first `__`, the key behind the
/// last; before that, the table it is in, where there are tables within tables.
fn variable_path(variable: &str, source: &Source) -> Result<(Group, String, String), ConfigError> {
    let unknown = |nearest: Option<String>| ConfigError::UnknownKey {
        source_place: source.clone(),
        key: variable.to_string(),
        nearest,
    };
    let path = variable.strip_prefix(VARIABLE_PREFIX).unwrap_or(variable).to_lowercase();
    let (head, rest) = path.split_once("__").unwrap_or((&path, ""));
    let Some(group) = Group::ALL.into_iter().find(|group| group.name() == head) else {
        if LATER_TABLES.contains(&head) {
            return Err(ConfigError::NotAvailable { source_place: source.clone(), what: format!("[{head}] is") });
        }
        let group = nearest(head, Group::ALL.into_iter().map(Group::name));
        return Err(unknown(group.map(|group| format!("{VARIABLE_PREFIX}{}__…", group.to_uppercase()))));
    };
    let upper = group.name().to_uppercase();
    if !group.is_named() {
        return match rest {
            "" => Err(unknown(Some(format!("{VARIABLE_PREFIX}{upper}__KEY")))),
            key => Ok((group, String::new(), key.replace("__", "."))),
        };
    }
    for table in group.subtables().chain(group.later().iter().copied()) {
        if let Some((name, key)) = rest.split_once(&format!("__{table}__")) {
            // One of a later version is refused whatever is in it.
            let key = if group.later().contains(&table) {
                table.to_string()
            } else {
                format!("{table}.{}", key.replace("__", "."))
            };
            return Ok((group, name.to_string(), key));
        }
    }
    let example = || Some(format!("{VARIABLE_PREFIX}{upper}__NAME__KEY"));
    let (name, key) = rest.rsplit_once("__").ok_or_else(|| unknown(example()))?;
    Ok((group, name.to_string(), key.to_string()))
}

fn unknown_table(key: &str, source_place: Source) -> ConfigError {
    if LATER_TABLES.contains(&key) {
        return ConfigError::NotAvailable { source_place, what: format!("[{key}] is") };
    }
    let near = nearest(key, Group::ALL.into_iter().map(Group::name));
    ConfigError::UnknownKey { source_place, key: key.to_string(), nearest: near.map(str::to_string) }
}

fn not_a_table(key: &str, group: Group, source_place: Source) -> ConfigError {
    let name = if group.is_named() { ".NAME" } else { "" };
    let expected = format!("a table: [{}{name}]", group.name());
    ConfigError::Invalid { source_place, key: key.to_string(), value: None, expected }
}

/// The key's name from the table, so that nothing that is not documented can be accepted.
fn known_key(group: Group, name: &str, key: &str, source: &Source) -> Result<&'static str, ConfigError> {
    if let Some((known, _)) = group.find(key) {
        return Ok(known);
    }
    let (source_place, full) = (source.clone(), group.path(name, key));
    if group.later().contains(&key) {
        return Err(ConfigError::NotAvailable { source_place, what: full + " is" });
    }
    let nearest = group.nearest(key).map(str::to_string);
    Err(ConfigError::UnknownKey { source_place, key: full, nearest })
}

/// Names become directories and parts of variables.
fn check_name(group: Group, name: &str, source: &Source) -> Result<(), ConfigError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if fits && name.bytes().all(plain) && !name.contains("__") {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        source_place: source.clone(),
        key: format!("name in {}", group.name()),
        value: Some(name.to_string()),
        expected: "1 to 40 characters a-z, 0-9 and _, without __".to_string(),
    })
}
